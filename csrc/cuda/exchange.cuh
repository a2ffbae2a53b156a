// D2 exchange: how many rows this rank has for every other, to all ranks.
#pragma once

#include "cuda/count.cuh"
#include "cuda/count_words.cuh"

namespace deep_a2a::cuda {

// The first bad entry that any block has found; one warp.
__device__ inline int32_t first_bad_entry(const Context& c, const DispatchTask& t) {
  int32_t bad = c.shared.bad_entry;
#pragma unroll 1
  for (int block = lane_idx(); t.plan.counting == Counting::kShared && block < static_cast<int>(gridDim.x);
       block += kWarpThreads) {
    bad = min(bad, ptx::ld_relaxed_sys(BlockCounts::at(c.shape, t.block_counts, block).bad_entry));
  }
  return __reduce_min_sync(kFullWarp, bad);
}

// What this rank was asked to do.
__device__ inline CountHeader header_of(const Context& c, const DispatchTask& t, int32_t bad) {
  const RowFormat& format = t.args.format;
  CountHeader header{
      t.args.num_tokens, format.payload_bytes, format.scale_bytes, static_cast<int32_t>(c.tag), -1, 0, 0};
  if (bad == kNoBadEntry) return header;
  header.bad_token = bad / c.shape.num_topk;
  header.bad_topk = bad % c.shape.num_topk;
  header.bad_expert = read_expert(t.args, bad);
  return header;
}

struct ColumnSums {
  int32_t before;  // this block
  int32_t all;
};

__device__ inline ColumnSums sum_blocks(const DispatchTask& t, const CountArena& arena, int i) {
  if (t.plan.counting == Counting::kAlone) return {0, arena.sums[i]};
  ColumnSums sums{0, 0};
  const int32_t* at = t.block_counts + i;
#pragma unroll 8
  for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
    const int32_t rows = ptx::ld_relaxed_sys(at + block * (arena.columns + 1));
    sums.before += block < static_cast<int>(blockIdx.x) ? rows : 0;
    sums.all += rows;
  }
  return sums;
}

// The count vector to the ranks of the node, one after another by the blocks, then to where it is put from to rail
// peers.
__device__ inline void store_vector(const Context& c, const CountArena& arena) {
#pragma unroll 1
  for (int i = blockIdx.x; i < c.num_locals() + min(num_streams(c), 1); i += gridDim.x) {
#pragma unroll 1
    for (int idx = threadIdx.x; idx < values_of_vector(c); idx += blockDim.x) {
      if (i < c.num_locals()) {
        store_count(c, i, c.team.rank, idx, arena.vector[idx]);
      } else {
        reinterpret_cast<int32_t*>(c.own(Region::kNetCountsOut, c.lane))[idx] = arena.vector[idx];
      }
    }
  }
}

// One warp for each rail peer, of the block that has written the vector.
__device__ inline void put_counts(const Context& c) {
  if constexpr (kHasNetwork) {
    if (static_cast<int>(blockIdx.x) != c.num_locals() % static_cast<int>(gridDim.x)) return;
    for (int idx = warp_idx(); idx < num_streams(c); idx += num_warps()) {
      const Stream stream = stream_of(c, idx);
      put_signal_warp(c.own(Region::kNetCountsIn, c.lane) + stream.at_peer * c.sizes.counts_bytes,
                      c.own(Region::kNetCountsOut, c.lane), c.sizes.counts_bytes,
                      c.own_word(Region::kNetCountsFlag, stream.at_peer), c.epoch, stream.pe);
    }
  }
}

// D1, rest, and D2: sums over the blocks, which are the values of the count vector; the counters become what came
// before each warp of the grid.
__device__ inline void d2_exchange(const Context& c, const DispatchTask& t, const CountArena& arena) {
  const int of_ranks = c.num_ranks() + c.shape.num_experts;
#pragma unroll 1
  for (int i = threadIdx.x; i < arena.columns; i += blockDim.x) {
    const ColumnSums sums = sum_blocks(t, arena, i);
    // A vector has the nodes first, then ranks and experts.
    arena.vector[i < of_ranks ? rank_rows_idx(c, i) : node_rows_idx(node_of_stream(c, i - of_ranks))] = sums.all;
    arena.sums[i] = sums.before;
  }
  if (warp_idx() == num_warps() - 1) {  // others have the counters
    const int32_t bad = first_bad_entry(c, t);
    if (lane_idx() == 0) {
      *reinterpret_cast<CountHeader*>(arena.vector) = header_of(c, t, bad);
      arena.vector[node_rows_idx(c.own_node())] = 0;
    }
  }
  __syncthreads();
  store_vector(c, arena);
#pragma unroll 1
  for (int i = threadIdx.x; i < arena.columns; i += blockDim.x) {
    const int32_t before = arena.sums[i];
#pragma unroll 4
    for (int warp = 0; before > 0 && warp < t.plan.count_warps; ++warp) arena.rows[warp * arena.columns + i] += before;
  }
  __syncthreads();
  if (num_streams(c) > 0) put_counts(c);
}

}  // namespace deep_a2a::cuda
