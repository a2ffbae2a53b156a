// Sums of BF16 rows in FP32: warps that load, each feeding one warp that adds, through a ring of the two.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

// One term of a sum, as the lane that loads it sees it; terms are added in the order of their lanes.
struct Term {
  const char* row = nullptr;  // null: this lane has none
  float weight = 1.0f;
};

enum class Weighting : int { kNone, kByTerm };

// A pair of warps and its part of the block: `empty` barriers follow the `full` ones.
struct SumRing {
  const CombinePlan& plan;
  int idx;
  bool loads;  // this warp does; the other one adds
  int stage_pitch;
  char* memory;
  uint64_t* full;
  uint64_t* empty;

  __device__ SumRing(const Context& c, const CombinePlan& the_plan)
      : plan(the_plan),
        idx(warp_idx() % the_plan.num_rings),
        loads(warp_idx() < the_plan.num_rings),
        stage_pitch(align_up(the_plan.chunk_bytes, 128)),
        memory(c.arena + static_cast<int64_t>(idx) * the_plan.num_stages * stage_pitch),
        full(c.shared.barriers + idx * 2 * the_plan.num_stages),
        empty(full + the_plan.num_stages) {}
  __device__ bool in_use() const { return warp_idx() < 2 * plan.num_rings; }
  __device__ char* stage(int stage_idx) const { return memory + stage_idx * stage_pitch; }
  // `ahead` places from `from`, at most a whole round.
  __device__ RingPosition at(RingPosition from, int ahead) const {
    from.stage += ahead;
    if (from.stage >= plan.num_stages) {
      from.stage -= plan.num_stages;
      from.parity ^= 1;
    }
    return from;
  }
};

template <Weighting kWeighting>
__device__ inline void add_term(float* sum, const uint4& packed, float weight, bool first) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
    if (kWeighting == Weighting::kByTerm) {
      sum[i] = first ? __fmul_rn(weight, value) : __fmaf_rn(weight, value, sum[i]);
    } else {
      sum[i] = first ? value : __fadd_rn(sum[i], value);
    }
  }
}

__device__ inline uint4 rounded(const float* sum) {
  return make_uint4(ptx::float2_to_bf16x2(sum[0], sum[1]), ptx::float2_to_bf16x2(sum[2], sum[3]),
                    ptx::float2_to_bf16x2(sum[4], sum[5]), ptx::float2_to_bf16x2(sum[6], sum[7]));
}

// Adds vectors of a lane that lie kStride apart, at `offset` of each of the chunks; several are under way at once.
template <Weighting kWeighting, int kCount, int kVectors>
__device__ inline void add_vectors(const char* const* chunks, const float* weights, int offset, char* out) {
  constexpr int kStride = kWarpThreads * 16;
  float sums[kVectors][8];
#pragma unroll
  for (int term = 0; term < kCount; ++term) {
    uint4 packed[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      packed[i] = *reinterpret_cast<const uint4*>(chunks[term] + offset + i * kStride);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) add_term<kWeighting>(sums[i], packed[i], weights[term], term == 0);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) *reinterpret_cast<uint4*>(out + offset + i * kStride) = rounded(sums[i]);
}

// Adds kCount chunks that lie in consecutive stages from `at` on, with the weights of the first lanes.
template <Weighting kWeighting, int kCount>
__device__ void add_chunks(const SumRing& ring, RingPosition at, float weight, char* out, int bytes) {
  constexpr int kVectors = 7, kStride = kWarpThreads * 16;
  const char* chunks[kCount];
  float weights[kCount];
#pragma unroll
  for (int term = 0; term < kCount; ++term) {
    chunks[term] = ring.stage(ring.at(at, term).stage) + lane_idx() * 16;
    weights[term] = kWeighting == Weighting::kByTerm ? __shfl_sync(kFullWarp, weight, term) : 1.0f;
  }
  out += lane_idx() * 16;
  int offset = 0;
  for (; offset + kVectors * kStride <= bytes; offset += kVectors * kStride) {
    add_vectors<kWeighting, kCount, kVectors>(chunks, weights, offset, out);
  }
  for (; offset + lane_idx() * 16 < bytes; offset += kStride) {
    add_vectors<kWeighting, kCount, 1>(chunks, weights, offset, out);
  }
}

// The same for any number of chunks, none included.
template <Weighting kWeighting>
__device__ void add_many_chunks(const SumRing& ring, RingPosition at, int count, float weight, char* out, int bytes) {
  for (int first = 0; first < bytes; first += kWarpThreads * 16) {
    const int offset = first + lane_idx() * 16;
    float sum[8] = {};
    for (int term = 0; term < count; ++term) {
      const float term_weight = kWeighting == Weighting::kByTerm ? __shfl_sync(kFullWarp, weight, term) : 1.0f;
      if (offset >= bytes) continue;
      const char* from = ring.stage(ring.at(at, term).stage) + offset;
      add_term<kWeighting>(sum, *reinterpret_cast<const uint4*>(from), term_weight, term == 0);
    }
    if (offset < bytes) *reinterpret_cast<uint4*>(out + offset) = rounded(sum);
  }
}

// Terms of the own node in a sum over nodes. They are added among themselves before they count as one.
struct OwnTerms {
  int begin = 0;
  int end = 0;

  // Whether that differs from adding all terms one after another.
  __device__ bool apart() const { return begin > 0 && end - begin > 1; }
};

// As add_many_chunks() for a sum over nodes, some of which come before the own one.
__device__ inline void add_node_chunks(const SumRing& ring, RingPosition at, int count, OwnTerms own_terms, char* out,
                                       int bytes) {
  for (int offset = lane_idx() * 16; offset < bytes; offset += kWarpThreads * 16) {
    float sum[8] = {}, own[8] = {};
    const auto add = [&](float* to, int term, bool first) {
      const char* from = ring.stage(ring.at(at, term).stage) + offset;
      add_term<Weighting::kNone>(to, *reinterpret_cast<const uint4*>(from), 1.0f, first);
    };
    for (int term = 0; term < own_terms.begin; ++term) add(sum, term, term == 0);
    for (int term = own_terms.begin; term < own_terms.end; ++term) add(own, term, term == own_terms.begin);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = __fadd_rn(sum[i], own[i]);
    for (int term = own_terms.end; term < count; ++term) add(sum, term, false);
    *reinterpret_cast<uint4*>(out + offset) = rounded(sum);
  }
}

// The values of the lanes in `present`, moved to the first lanes.
__device__ inline float compact(float value, uint32_t present) {
  float mine = 0.0f;
  for (int i = 0; present != 0; ++i, present &= present - 1) {
    const float moved = __shfl_sync(kFullWarp, value, __ffs(present) - 1);
    if (lane_idx() == i) mine = moved;
  }
  return mine;
}

// Loads the terms of one sum, a lane for each, once their stages are free. Both warps of a ring pass the same terms;
// `at` goes on.
__device__ inline void load_row(const SumRing& ring, RingPosition& at, const Term& term, int row_bytes) {
  const uint32_t present = __ballot_sync(kFullWarp, term.row != nullptr);
  const int count = __popc(present);
  RingPosition mine = ring.at(at, __popc(present & lanes_below()));
  for (int offset = 0; offset < row_bytes; offset += ring.plan.chunk_bytes) {
    if (term.row != nullptr) {
      const int bytes = min(ring.plan.chunk_bytes, row_bytes - offset);
      wait_full(ring.empty + mine.stage, mine.parity ^ 1);  // a fresh barrier has passed the phase before its first
      ptx::fence_proxy_async_shared();  // what the other warp has read is overwritten by a bulk load
      ptx::mbarrier_arrive_expect_tx(ring.full + mine.stage, bytes);
      ptx::bulk_load(ring.stage(mine.stage), term.row + offset, bytes, ring.full + mine.stage);
    }
    // A parity tells one phase from the next alone. Whoever loaded what lay in a stage before has seen the stage
    // emptied for that: now all lanes know.
    __syncwarp();
    mine = ring.at(mine, count);
    at = ring.at(at, count);
  }
}

// Adds the chunks of one sum with `add` as they come, and writes them, rounded, to `out`.
template <class Add>
__device__ void add_row(const SumRing& ring, RingPosition& at, int count, char* out, int row_bytes, Add&& add) {
  for (int offset = 0; offset < row_bytes; offset += ring.plan.chunk_bytes) {
    for (int i = 0; i < count; ++i) wait_full(ring.full + ring.at(at, i).stage, ring.at(at, i).parity);
    add(out + offset, min(ring.plan.chunk_bytes, row_bytes - offset));
    __syncwarp();
    if (lane_idx() < count) ptx::mbarrier_arrive(ring.empty + ring.at(at, lane_idx()).stage);
    at = ring.at(at, count);
  }
}

template <Weighting kWeighting>
__device__ void add_row(const SumRing& ring, RingPosition& at, const Term& term, char* out, int row_bytes) {
  const uint32_t present = __ballot_sync(kFullWarp, term.row != nullptr);
  const int count = __popc(present);
  const float weight = kWeighting == Weighting::kByTerm ? compact(term.weight, present) : 1.0f;
  const auto add_with = [&](auto&& add) { add_row(ring, at, count, out, row_bytes, add); };
  switch (count) {
    case 1:
      return add_with([&](char* to, int bytes) { add_chunks<kWeighting, 1>(ring, at, weight, to, bytes); });
    case 2:
      return add_with([&](char* to, int bytes) { add_chunks<kWeighting, 2>(ring, at, weight, to, bytes); });
    case 3:
      return add_with([&](char* to, int bytes) { add_chunks<kWeighting, 3>(ring, at, weight, to, bytes); });
    case 4:
      return add_with([&](char* to, int bytes) { add_chunks<kWeighting, 4>(ring, at, weight, to, bytes); });
    default:
      return add_with([&](char* to, int bytes) { add_many_chunks<kWeighting>(ring, at, count, weight, to, bytes); });
  }
}

}  // namespace deep_a2a::cuda
