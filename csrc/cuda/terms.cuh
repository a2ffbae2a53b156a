// Sums of BF16 rows in FP32: what they are made of.
#pragma once

#include "cuda/context.cuh"

namespace deep_a2a::cuda {

constexpr int kSumStride = kWarpThreads * 16;  // from one piece of a lane's to its next

// One sum. By lane, the first `count`: the terms, in the order in which they are added.
struct Sum {
  const char* row = nullptr;
  float weight = 1.0f;
  int count = 0;
  char* out = nullptr;  // null: nothing is to be summed
  // Terms that are added among themselves before they count as one: those of the own node in a sum over nodes.
  int apart_begin = 0;
  int apart_end = 0;

  // Whether that differs from adding all terms one after another.
  __device__ bool is_apart() const { return apart_begin > 0 && apart_end - apart_begin > 1; }
};

// A lane's value, in all lanes.
__device__ inline float shuffled(float value, int lane) { return __shfl_sync(kFullWarp, value, lane); }
__device__ inline const char* shuffled(const char* value, int lane) {
  return reinterpret_cast<const char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(value), lane));
}

// The values of the lanes in `present`, moved to the first lanes.
template <class Value>
__device__ inline Value compact(Value value, uint32_t present) {
  Value mine{};
  for (int i = 0; present != 0; ++i, present &= present - 1) {
    const Value moved = shuffled(value, __ffs(static_cast<int>(present)) - 1);
    if (lane_idx() == i) mine = moved;
  }
  return mine;
}

// A sum of the lanes' rows; null for lanes that have none.
__device__ inline Sum sum_of(const char* row, char* out) {
  Sum sum;
  const uint32_t present = __ballot_sync(kFullWarp, row != nullptr);
  sum.row = compact(row, present);
  sum.count = __popc(present);
  sum.out = out;
  return sum;
}
__device__ inline Sum weighted_sum_of(const char* row, float weight, char* out) {
  Sum sum = sum_of(row, out);
  sum.weight = compact(weight, __ballot_sync(kFullWarp, row != nullptr));
  return sum;
}

// A weight of 1 changes nothing, so that all sums are weighted.
__device__ inline void add_term(float* sum, const uint4& packed, float weight, bool first) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
    sum[i] = first ? __fmul_rn(weight, value) : __fmaf_rn(weight, value, sum[i]);
  }
}

__device__ inline uint4 rounded(const float* sum) {
  return make_uint4(ptx::float2_to_bf16x2(sum[0], sum[1]), ptx::float2_to_bf16x2(sum[2], sum[3]),
                    ptx::float2_to_bf16x2(sum[4], sum[5]), ptx::float2_to_bf16x2(sum[6], sum[7]));
}

}  // namespace deep_a2a::cuda
