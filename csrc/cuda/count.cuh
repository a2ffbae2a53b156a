// D1 count: how many rows go where, and each row's place among this source's rows.
#pragma once

#include "cuda/token_walk.cuh"

namespace deep_a2a::cuda {

// D1, first pass: what the tokens that this block counts want; where blocks share them, into the scratch, too.
__device__ inline void d1_count_block(const Context& c, const DispatchTask& t, const CountArena& arena) {
  constexpr int kTogether = 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < t.plan.count_warps * arena.columns; i += blockDim.x) arena.rows[i] = 0;
  if (threadIdx.x == 0) c.shared.bad_entry = kNoBadEntry;
  __syncthreads();
  TokenWalk<Pass::kCount>(c, t, arena).run();
  __syncthreads();
  // The warps' counts become what came before each warp.
  const BlockCounts counts = BlockCounts::at(c.shape, t.block_counts, blockIdx.x);
#pragma unroll 1
  for (int i = threadIdx.x; i < arena.columns; i += blockDim.x) {
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < t.plan.count_warps; first += kTogether) {
      int32_t rows[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        rows[k] = first + k < t.plan.count_warps ? arena.rows[(first + k) * arena.columns + i] : 0;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < t.plan.count_warps) arena.rows[(first + k) * arena.columns + i] = sum;
        sum += rows[k];
      }
    }
    arena.sums[i] = sum;
    if (t.plan.counting == Counting::kShared) counts.columns[i] = sum;
  }
  if (t.plan.counting == Counting::kAlone) return;
  if (threadIdx.x == 0) *counts.bad_entry = c.shared.bad_entry;
  __syncthreads();
  if (threadIdx.x == 0) grid_arrive(c.control.grid.counted);
}

// D1, second pass: each row's place among all rows of this source; where rows are per expert, D4 of their records.
__device__ inline void d1_place(const Context& c, const DispatchTask& t, const CountArena& arena) {
  TokenWalk<Pass::kPlace>(c, t, arena).run();
  __syncthreads();
  if (threadIdx.x == 0 && t.plan.counting == Counting::kShared) grid_arrive(c.control.grid.placed);
}

}  // namespace deep_a2a::cuda
