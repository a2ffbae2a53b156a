// D1 count and D2 exchange: how many rows go where, each row's place among this source's rows, and the numbers to all
// ranks.
#pragma once

#include "cuda/sync.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

constexpr int32_t kNoBadEntry = INT32_MAX;

// The counters of D1 in the arena: one row for each warp that counts.
struct CountArena {
  int32_t* rank_rows;    // [warps, ranks]
  int32_t* stream_rows;  // [warps, streams]
  int32_t* expert_rows;  // [warps, experts]
  int32_t* sums;         // over the warps: ranks, experts, streams, as in BlockCounts

  __device__ CountArena(const Context& c, const DispatchPlan& plan) {
    rank_rows = reinterpret_cast<int32_t*>(c.arena + plan.ring_offset);
    stream_rows = rank_rows + plan.count_warps * c.num_ranks();
    expert_rows = stream_rows + plan.count_warps * num_streams(c);
    sums = expert_rows + plan.count_warps * c.shape.num_experts;
  }
};

struct Range {
  int begin;
  int end;
};

// The tokens that this warp counts: consecutive ones, in the order of blocks, then of warps.
__device__ inline Range tokens_of_warp(int num_tokens, const DispatchPlan& plan) {
  const bool alone = plan.counting == Counting::kAlone;
  const int64_t parts = int64_t{alone ? 1 : gridDim.x} * plan.count_warps;
  const int64_t part = int64_t{alone ? 0 : blockIdx.x} * plan.count_warps + warp_idx();
  return {static_cast<int>(num_tokens * part / parts), static_cast<int>(num_tokens * (part + 1) / parts)};
}

__device__ inline int64_t read_expert(const DispatchArgs& args, int64_t entry) {
  return args.topk_idx_bytes == 8 ? static_cast<const int64_t*>(args.topk_idx)[entry]
                                  : static_cast<const int32_t*>(args.topk_idx)[entry];
}

// The ranks of a node that a token goes to, as bits.
__device__ inline uint32_t wanted_ranks(const Context& c, const DispatchArgs& args, int token, int node) {
  const int first = node * c.sizes.node_num_experts;
  uint32_t wanted = 0;
#pragma unroll 8
  for (int slot = 0; slot < c.shape.num_topk; ++slot) {
    const int64_t on_node = read_expert(args, int64_t{token} * c.shape.num_topk + slot) - first;
    if (on_node >= 0 && on_node < c.sizes.node_num_experts) wanted |= 1u << c.local_of(static_cast<int>(on_node));
  }
  return wanted;
}

// Calls use(token, node, local rank, place or -1) for the warp's tokens and all ranks, and use_stream(token, node,
// place or -1) for all other nodes; the counters go on.
template <class Use, class UseStream>
__device__ void for_rank_places(const Context& c, const DispatchArgs& args, Range tokens, int32_t* rows,
                                int32_t* stream_rows, Use&& use, UseStream&& use_stream) {
  const int locals = c.num_locals();
  for (int first = tokens.begin; first < tokens.end; first += kWarpThreads) {
    const int token = first + lane_idx();
    for (int node = 0; node < c.sizes.num_nodes; ++node) {
      const uint32_t wanted = token < tokens.end ? wanted_ranks(c, args, token, node) : 0;
      int32_t count = lane_idx() < locals ? rows[node * locals + lane_idx()] : 0;  // of the lane's rank
      for (int local = 0; local < locals; ++local) {
        const bool here = (wanted >> local & 1) != 0;
        const uint32_t lanes = __ballot_sync(kFullWarp, here);
        const int32_t before = __shfl_sync(kFullWarp, count, local);
        if (token < tokens.end) use(token, node, local, here ? before + __popc(lanes & lanes_below()) : -1);
        if (lane_idx() == local) count += __popc(lanes);
      }
      if (lane_idx() < locals) rows[node * locals + lane_idx()] = count;
      if (!kHasNetwork || node == c.own_node()) continue;
      int32_t& stream_count = stream_rows[c.shape.topology.stream_idx(c.own_node(), node)];
      const uint32_t lanes = __ballot_sync(kFullWarp, wanted != 0);
      const int32_t before = stream_count;
      __syncwarp();
      if (lane_idx() == 0) stream_count = before + __popc(lanes);
      __syncwarp();
      if (token < tokens.end) use_stream(token, node, before + __popc(lanes & lanes_below()), wanted != 0);
    }
  }
  __syncwarp();
}

// The expert of an entry, -1 for none. One that is out of range is noted, and counts as none.
__device__ inline int checked_expert(const Context& c, const DispatchArgs& args, int entry) {
  const int64_t expert = read_expert(args, entry);
  if (expert >= -1 && expert < c.shape.num_experts) return static_cast<int>(expert);
  atomicMin(&c.shared.bad_entry, entry);
  return -1;
}

// Calls use(entry, expert or -1) for the entries of the warp's tokens.
template <class Use>
__device__ void for_experts(const Context& c, const DispatchArgs& args, Range tokens, Use&& use) {
  const int end = tokens.end * c.shape.num_topk;
#pragma unroll 4
  for (int entry = tokens.begin * c.shape.num_topk + lane_idx(); entry < end; entry += kWarpThreads) {
    use(entry, checked_expert(c, args, entry));
  }
}

// Calls use(entry, expert or -1, place) for the entries of the warp's tokens; `rows` counts on.
template <class Use>
__device__ void for_expert_places(const Context& c, const DispatchArgs& args, Range tokens, int32_t* rows, Use&& use) {
  const int end = tokens.end * c.shape.num_topk;
  for (int first = tokens.begin * c.shape.num_topk; first < end; first += kWarpThreads) {
    const int entry = first + lane_idx();
    const int expert = entry < end ? checked_expert(c, args, entry) : -1;
    const uint32_t same = __match_any_sync(kFullWarp, expert);
    const int32_t place = expert >= 0 ? rows[expert] + __popc(same & lanes_below()) : 0;
    __syncwarp();
    if (expert >= 0 && (same & lanes_below()) == 0) rows[expert] += __popc(same);
    __syncwarp();
    if (entry < end) use(entry, expert, place);
  }
}

// Turns the warps' counts of one column into what came before each warp; returns the sum.
__device__ inline int32_t scan_warps(int32_t* column, int stride, int count_warps) {
  int32_t sum = 0;
#pragma unroll 8
  for (int warp = 0; warp < count_warps; ++warp) {
    const int32_t rows = column[warp * stride];
    column[warp * stride] = sum;
    sum += rows;
  }
  return sum;
}

// Calls use(column, its stride, its index) for all counters, spread over the threads of the block.
template <class Use>
__device__ void for_counters(const Context& c, const CountArena& arena, Use&& use) {
  const int ranks = c.num_ranks(), experts = c.shape.num_experts;
  for (int i = threadIdx.x; i < ranks + experts + num_streams(c); i += blockDim.x) {
    if (i < ranks) {
      use(arena.rank_rows + i, ranks, i);
    } else if (i < ranks + experts) {
      use(arena.expert_rows + (i - ranks), experts, i);
    } else {
      use(arena.stream_rows + (i - ranks - experts), num_streams(c), i);
    }
  }
}

// Whether the warps have counted this column one by one, so that places follow from it; else only its sum is there.
__device__ inline bool has_places(const Context& c, int column) {
  return c.shape.row_per_expert() || column < c.num_ranks() || column >= c.num_ranks() + c.shape.num_experts;
}

// D1, first pass: what this block's tokens want, into the scratch.
__device__ inline void d1_count_block(const Context& c, const DispatchTask& t, const CountArena& arena) {
  const int columns = static_cast<int>(BlockCounts::num_columns(c.shape));
  for (int i = threadIdx.x; i < columns; i += blockDim.x) arena.sums[i] = 0;
  const int counters = t.plan.count_warps * (c.shape.row_per_expert() ? columns : c.num_ranks() + num_streams(c));
  for (int i = threadIdx.x; i < counters; i += blockDim.x) arena.rank_rows[i] = 0;
  if (threadIdx.x == 0) c.shared.bad_entry = kNoBadEntry;
  __syncthreads();
  if (warp_idx() < t.plan.count_warps) {
    const Range tokens = tokens_of_warp(t.args.num_tokens, t.plan);
    for_rank_places(
        c, t.args, tokens, arena.rank_rows + warp_idx() * c.num_ranks(),
        arena.stream_rows + warp_idx() * num_streams(c), [](int, int, int, int32_t) {}, [](int, int, int32_t, bool) {});
    if (c.shape.row_per_expert()) {
      for_expert_places(c, t.args, tokens, arena.expert_rows + warp_idx() * c.shape.num_experts,
                        [&](int entry, int expert, int32_t) { t.source.experts[entry] = expert; });
    } else {  // only how many
      for_experts(c, t.args, tokens, [&](int entry, int expert) {
        t.source.experts[entry] = expert;
        if (expert >= 0) atomicAdd(arena.sums + c.num_ranks() + expert, 1);
      });
    }
  }
  __syncthreads();
  for_counters(c, arena, [&](int32_t* column, int stride, int i) {
    if (has_places(c, i)) arena.sums[i] = scan_warps(column, stride, t.plan.count_warps);
  });
  if (t.plan.counting == Counting::kAlone) return;
  const BlockCounts counts = BlockCounts::at(c.shape, t.block_counts, blockIdx.x);
  for_counters(c, arena, [&](int32_t*, int, int i) { counts.columns[i] = arena.sums[i]; });
  if (threadIdx.x == 0) *counts.bad_entry = c.shared.bad_entry;
  __syncthreads();
  if (threadIdx.x == 0) grid_arrive(c.control.grid.counted);
}

// The first bad entry that any block has found; one warp.
__device__ inline int32_t first_bad_entry(const Context& c, const DispatchTask& t) {
  int32_t bad = c.shared.bad_entry;
  for (int block = lane_idx(); t.plan.counting == Counting::kShared && block < static_cast<int>(gridDim.x);
       block += kWarpThreads) {
    bad = min(bad, ptx::ld_relaxed_sys(BlockCounts::at(c.shape, t.block_counts, block).bad_entry));
  }
  return __reduce_min_sync(kFullWarp, bad);
}

// What this rank was asked to do; one thread.
__device__ inline void fill_header(const Context& c, const DispatchTask& t, int32_t bad, CountHeader* header) {
  const RowFormat& format = t.args.format;
  *header = {t.args.num_tokens, format.payload_bytes, format.scale_bytes, static_cast<int32_t>(c.tag), -1, 0, 0};
  if (bad == kNoBadEntry) return;
  header->bad_token = bad / c.shape.num_topk;
  header->bad_topk = bad % c.shape.num_topk;
  header->bad_expert = read_expert(t.args, bad);
}

struct ColumnSums {
  int32_t before;  // this block
  int32_t all;
};

__device__ inline ColumnSums sum_blocks(const Context& c, const DispatchTask& t, const CountArena& arena, int i) {
  if (t.plan.counting == Counting::kAlone) return {0, arena.sums[i]};
  ColumnSums sums{0, 0};
#pragma unroll 8
  for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
    const int32_t rows = ptx::ld_relaxed_sys(BlockCounts::at(c.shape, t.block_counts, block).columns + i);
    sums.before += block < static_cast<int>(blockIdx.x) ? rows : 0;
    sums.all += rows;
  }
  return sums;
}

// The count vectors that this block writes: those for the ranks of the node, then the one that is put to rail peers.
template <class Use>
__device__ void for_vectors(const Context& c, Use&& use) {
  for (int i = blockIdx.x; i < c.num_locals() + min(num_streams(c), 1); i += gridDim.x) {
    use(i < c.num_locals() ? c.counts_at(i, c.team.rank) : c.vector_at(c.own(Region::kNetCountsOut, c.lane)));
  }
}

// One warp for each rail peer, of the block that has written the vector.
__device__ inline void put_counts(const Context& c) {
  if constexpr (kHasNetwork) {
    if (num_streams(c) == 0 || static_cast<int>(blockIdx.x) != c.num_locals() % static_cast<int>(gridDim.x)) return;
    for (int idx = warp_idx(); idx < num_streams(c); idx += num_warps()) {
      const Stream stream = stream_of(c, idx);
      put_signal_warp(c.own(Region::kNetCountsIn, c.lane) + stream.at_peer * c.sizes.counts_bytes,
                      c.own(Region::kNetCountsOut, c.lane), c.sizes.counts_bytes,
                      c.own_word(Region::kNetCountsFlag, stream.at_peer), c.epoch, stream.pe);
    }
  }
}

// D1, rest, and D2: sums over the blocks; the count vector to the ranks of the node, one after another by the blocks,
// and once to each rail peer.
__device__ inline void d2_exchange(const Context& c, const DispatchTask& t, const CountArena& arena) {
  const int ranks = c.num_ranks(), experts = c.shape.num_experts;
  for_counters(c, arena, [&](int32_t* column, int stride, int i) {
    const ColumnSums sums = sum_blocks(c, t, arena, i);
    for (int warp = 0; has_places(c, i) && warp < t.plan.count_warps; ++warp) column[warp * stride] += sums.before;
    for_vectors(c, [&](const CountVector& to) {
      int32_t* at = i < ranks             ? to.rank_rows + i
                    : i < ranks + experts ? to.expert_rows + (i - ranks)
                                          : to.node_rows + stream_of(c, i - ranks - experts).node;
      *at = sums.all;
    });
  });
  if (warp_idx() == num_warps() - 1) {  // others have the counters
    const int32_t bad = first_bad_entry(c, t);
    if (lane_idx() == 0) {
      for_vectors(c, [&](const CountVector& to) {
        fill_header(c, t, bad, to.header);
        to.node_rows[c.own_node()] = 0;
      });
    }
  }
  __syncthreads();
  for (int local = blockIdx.x + threadIdx.x * gridDim.x; local < c.num_locals(); local += gridDim.x * blockDim.x) {
    signal(c.team, c.word(local, Region::kCountsFlag, c.lane, c.team.rank), c.epoch);
  }
  put_counts(c);
}

// Of the slots of a token whose experts are at this rank of another node: the place there, for its route entries.
__device__ inline void keep_slot_places(const Context& c, const DispatchTask& t, int token, int node, int local,
                                        int32_t place) {
  const int first = node * c.sizes.node_num_experts + local * c.sizes.num_local_experts;
  for (int slot = 0; slot < c.shape.num_topk; ++slot) {
    const int64_t entry = int64_t{token} * c.shape.num_topk + slot;
    const int64_t expert = read_expert(t.args, entry);
    if (expert >= first && expert < first + c.sizes.num_local_experts) t.source.slot_places[entry] = place;
  }
}

// D1, second pass: each row's place among all rows of this source. The counters hold what came before each warp.
__device__ inline void d1_place(const Context& c, const DispatchTask& t, const CountArena& arena) {
  if (warp_idx() < t.plan.count_warps) {
    const Range tokens = tokens_of_warp(t.args.num_tokens, t.plan);
    for_rank_places(
        c, t.args, tokens, arena.rank_rows + warp_idx() * c.num_ranks(),
        arena.stream_rows + warp_idx() * num_streams(c),
        [&](int token, int node, int local, int32_t place) {
          if (!kHasNetwork || node == c.own_node()) {
            t.source.rank_places[int64_t{token} * c.num_locals() + local] = place;
          } else if (place >= 0) {
            keep_slot_places(c, t, token, node, local, place);
          }
        },
        [&](int token, int node, int32_t row, bool wanted) {
          const int64_t stream = c.shape.topology.stream_idx(c.own_node(), node);
          t.source.stream_rows[int64_t{token} * num_streams(c) + stream] = wanted ? row : -1;
          if (wanted) t.source.stream_tokens[stream * t.args.num_tokens + row] = token;
          const int rounds = c.shape.num_rounds(), round = rounds > 1 ? token / c.shape.round_tokens : 0;
          if (token == round * c.shape.round_tokens) t.source.round_starts[stream * rounds + round] = row;
        });
    if (c.shape.row_per_expert()) {
      for_expert_places(c, t.args, tokens, arena.expert_rows + warp_idx() * c.shape.num_experts,
                        [&](int entry, int, int32_t place) { t.source.expert_places[entry] = place; });
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && t.plan.counting == Counting::kShared) grid_arrive(c.control.grid.placed);
}

}  // namespace deep_a2a::cuda
