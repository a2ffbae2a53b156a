// Collective operations of warps that fall apart into groups, against a scalar reference.
#include <algorithm>
#include <cstring>

#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

constexpr int kWarps = 3;
constexpr int kRounds = 40;
constexpr uint32_t kNobody = 0;

enum Result {
  kShuffled,
  kUp,
  kDown,
  kXor,
  kFloat,
  kWide,
  kBallot,
  kAny,
  kAll,
  kMatch,
  kAdd,
  kMost,
  kLeast,
  kMostSigned,
  kLeastSigned,
  kOr,
  kResults
};

// Lanes fall into up to three groups, and up to 3 distinct widths.
__host__ __device__ int group_of(int round, int lane) {
  return static_cast<int>(hash(round * 64 + lane) % (1 + round % 3));
}
__host__ __device__ uint32_t mask_of(int round, int lane) {
  uint32_t mask = 0;
  for (int other = 0; other < 32; ++other) mask |= group_of(round, other) == group_of(round, lane) ? 1u << other : 0;
  return mask;
}
__host__ __device__ uint32_t value_of(int warp, int round, int lane) {
  const uint32_t value = hash((warp * kRounds + round) * 32 + lane + 7);
  return round % 2 == 0 ? value : value % 5;
}
__host__ __device__ int width_of(int round) { return 32 >> (round % 4); }
__host__ __device__ int operand_of(int round) { return static_cast<int>(hash(round) % 32); }

__global__ void all_operations(uint64_t* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < kRounds; ++round) {
    uint64_t* to = out + ((warp * kRounds + round) * 32 + lane) * kResults;
    const uint32_t mask = mask_of(round, lane), value = value_of(warp, round, lane);
    const int width = width_of(round), operand = operand_of(round);
    // Groups take turns of different lengths, so that they never meet in the same place.
    for (int turn = 0; turn <= group_of(round, lane); ++turn) {
      to[kShuffled] = __shfl_sync(mask, value, operand, width);
      to[kUp] = __shfl_up_sync(mask, value, operand, width);
      to[kDown] = __shfl_down_sync(mask, value, operand, width);
      to[kXor] = __shfl_xor_sync(mask, value, operand % width, width);
      to[kFloat] = __float_as_uint(__shfl_sync(mask, __uint_as_float(value & 0x3FFFFFFF), operand, width));
      to[kWide] = __shfl_down_sync(mask, uint64_t{value} << 32 | lane, operand, width);
      to[kBallot] = __ballot_sync(mask, value % 3 == 0);
      to[kAny] = __any_sync(mask, value % 64 == 0);
      to[kAll] = __all_sync(mask, value % 64 != 0);
      to[kMatch] = __match_any_sync(mask, value);
      to[kAdd] = __reduce_add_sync(mask, value);
      to[kMost] = __reduce_max_sync(mask, value);
      to[kLeast] = __reduce_min_sync(mask, value);
      to[kMostSigned] = static_cast<uint32_t>(__reduce_max_sync(mask, static_cast<int>(value)));
      to[kLeastSigned] = static_cast<uint32_t>(__reduce_min_sync(mask, static_cast<int>(value)));
      to[kOr] = __reduce_or_sync(mask, value);
      __syncwarp(mask);
    }
  }
}

struct Reference {
  int warp, round, lane;

  uint32_t value(int other) const { return value_of(warp, round, other); }

  // Where a shuffle reads, or -1 where that is undefined.
  int source(Result which) const {
    const int width = width_of(round), segment = lane / width * width, operand = operand_of(round);
    int from = lane;
    if (which == kShuffled) from = segment + operand % width;
    if (which == kUp && lane - operand >= segment) from = lane - operand;
    if (which == kDown && lane + operand < segment + width) from = lane + operand;
    if (which == kXor) from = segment + ((lane - segment) ^ (operand % width));
    return (mask_of(round, lane) >> from & 1) != 0 ? from : -1;
  }

  void check(const uint64_t* seen) const {
    const uint32_t mask = mask_of(round, lane);
    uint64_t expected[kResults] = {};
    expected[kAll] = 1;
    expected[kLeast] = value(lane);
    expected[kMostSigned] = expected[kLeastSigned] = value(lane);
    for (int other = 0; other < 32; ++other) {
      if ((mask >> other & 1) == 0) continue;
      const uint32_t theirs = value(other);
      expected[kBallot] |= theirs % 3 == 0 ? 1u << other : 0;
      expected[kAny] |= theirs % 64 == 0;
      expected[kAll] &= theirs % 64 != 0;
      expected[kMatch] |= theirs == value(lane) ? 1u << other : 0;
      expected[kAdd] = static_cast<uint32_t>(expected[kAdd] + theirs);
      expected[kMost] = std::max<uint64_t>(expected[kMost], theirs);
      expected[kLeast] = std::min<uint64_t>(expected[kLeast], theirs);
      if (static_cast<int>(theirs) > static_cast<int>(expected[kMostSigned])) expected[kMostSigned] = theirs;
      if (static_cast<int>(theirs) < static_cast<int>(expected[kLeastSigned])) expected[kLeastSigned] = theirs;
      expected[kOr] |= theirs;
    }
    for (Result which : {kShuffled, kUp, kDown, kXor}) {
      expected[which] = source(which) >= 0 ? value(source(which)) : seen[which];
    }
    expected[kFloat] = source(kShuffled) >= 0 ? value(source(kShuffled)) & 0x3FFFFFFF : seen[kFloat];
    const int wide = source(kDown);
    expected[kWide] = wide >= 0 ? uint64_t{value(wide)} << 32 | wide : seen[kWide];
    for (int which = 0; which < kResults; ++which) {
      expect_equal(seen[which], expected[which], "warp ", warp, " round ", round, " lane ", lane, " result ", which);
    }
  }
};

// Lanes leave one after another while the others name all.
__global__ void with_exits(uint32_t* out) {
  const int lane = threadIdx.x;
  for (int round = 0; round < 31; ++round) {
    if (lane == (round * 7) % 32) return;
    out[round * 32 + lane] = __ballot_sync(~0u, 1);
  }
}

}  // namespace

void test_warps() {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    emulator::set_seed(seed);
    Array<uint64_t> out(kWarps * kRounds * 32 * kResults);
    run_well(all_operations, 1, kWarps * 32, 0, out.get());
    for (int i = 0; i < kWarps * kRounds * 32; ++i) {
      Reference{i / 32 / kRounds, i / 32 % kRounds, i % 32}.check(&out[static_cast<size_t>(i) * kResults]);
    }
    Array<uint32_t> lanes(31 * 32, kNobody);
    run_well(with_exits, 1, 32, 0, lanes.get());
    uint32_t left = ~0u;
    for (int round = 0; round < 31; ++round) {
      left &= ~(1u << (round * 7) % 32);
      for (int lane = 0; lane < 32; ++lane) {
        expect_equal(lanes[round * 32 + lane], (left >> lane & 1) != 0 ? left : kNobody, "round ", round, " lane ",
                     lane);
      }
    }
  }
}

}  // namespace deep_a2a::emulator_test
