// D3 bases: from the counts of all ranks, where this source's rows start everywhere on the node, and whether the
// dispatch may go ahead at all. Every block works this out for itself.
#pragma once

#include "cuda/count.cuh"

namespace deep_a2a::cuda {

// The counters of D3 in the arena. The first three stay until the rows have been sent and relayed.
struct BasesArena {
  int32_t* expert_bases;  // [experts], where this source's rows start in the expert's group, then in its rank's rows
  int32_t* relay_rank_bases;    // [streams, ranks of the node], the same for the rank rows of a rail peer
  int32_t* relay_expert_bases;  // [streams, experts of the node], and for its expert rows
  int32_t* rank_rows;           // [ranks], rank rows that each rank receives
  int32_t* expert_rows;         // [experts], behind them: of all sources
  int32_t* group_rows;          // [ranks], rows of `x` that each rank receives
  int32_t* received_rows;       // [ranks], rank rows that this rank receives from each
  int32_t* sent_rows;           // [ranks of the node], that it sends to each
  int32_t* own_offsets;         // [local experts], where their groups start at this rank

  __device__ BasesArena(const Context& c, const DispatchPlan& plan) {
    expert_bases = reinterpret_cast<int32_t*>(c.arena);
    relay_rank_bases = expert_bases + (c.shape.row_per_expert() ? c.shape.num_experts : 0);
    relay_expert_bases = relay_rank_bases + num_streams(c) * c.num_locals();
    rank_rows = reinterpret_cast<int32_t*>(c.arena + plan.ring_offset);
    expert_rows = rank_rows + c.num_ranks();
    group_rows = expert_rows + c.shape.num_experts;
    received_rows = group_rows + c.num_ranks();
    sent_rows = received_rows + c.num_ranks();
    own_offsets = sent_rows + c.num_locals();
  }
};

__device__ inline CountVector counts_of(const Context& c, int source) { return c.counts_at(c.local_rank(), source); }

// All threads; false where the kernel has to be left.
__device__ inline bool d3_wait_counts(const Context& c) {
  bool ok = true;
#pragma unroll 1
  for (int source = threadIdx.x; source < c.num_ranks(); source += blockDim.x) {
    ok = ok && wait(c, c.own_word(Region::kCountsFlag, source), c.epoch, Step::kD3Bases, source);
  }
  return all_of_block(ok);
}

// What one column of the count vectors, a rank or an expert, leaves behind beside its sum. Null for nothing.
struct ColumnBases {
  int32_t* before = nullptr;  // rows of the sources before this one
  int32_t* relays = nullptr;  // for each stream, of the sources before its rail peer
  int stride = 0;             // of these

  __device__ ColumnBases(const Context& c, const BasesArena& arena, int column) {
    const int ranks = c.num_ranks(), expert = column - ranks;
    if (column < ranks) {
      const int local = column - c.neighbour(0);
      if (static_cast<uint32_t>(local) >= static_cast<uint32_t>(c.num_locals())) return;
      before = c.shared.rank_bases + local;
      relays = arena.relay_rank_bases + local;
      stride = c.num_locals();
    } else if (c.shape.row_per_expert()) {
      before = arena.expert_bases + expert;
      const int on_node = expert - c.sizes.node_first_expert;
      if (static_cast<uint32_t>(on_node) >= static_cast<uint32_t>(c.sizes.node_num_experts)) return;
      relays = arena.relay_expert_bases + on_node;
      stride = c.sizes.node_num_experts;
    }
  }
};

// Sums over the sources, a thread for each rank and each expert.
__device__ inline void sum_counts(const Context& c, const BasesArena& arena) {
  const int ranks = c.num_ranks();
#pragma unroll 1
  for (int column = threadIdx.x; column < ranks + c.shape.num_experts; column += blockDim.x) {
    const ColumnBases bases(c, arena, column);
    const int32_t* counts = counts_of(c, 0).rank_rows + column;  // experts lie behind ranks there, too
    int32_t before = 0, all = 0, own = 0;
    int rail = num_streams(c) > 0 && bases.relays != nullptr ? c.local_rank() : ranks, node = 0;
#pragma unroll 4
    for (int source = 0; source < ranks; ++source) {
      const int32_t rows = ptx::ld_relaxed_sys(counts + source * (c.sizes.counts_bytes / 4));
      if (source == c.team.rank) before = all, own = rows;
      if (kHasNetwork && source == rail) {
        if (node != c.own_node()) bases.relays[stream_to(c, node) * bases.stride] = all;
        rail += c.num_locals();
        ++node;
      }
      all += rows;
      if (column == c.team.rank) arena.received_rows[source] = rows;
    }
    arena.rank_rows[column] = all;
    if (bases.before != nullptr) *bases.before = before;
    if (column < ranks && bases.before != nullptr) arena.sent_rows[column - c.neighbour(0)] = own;
  }
}

// Whether the headers of two ranks differ, or one has an objection of its own; by the last threads.
__device__ inline bool objects(const Context& c) {
  bool objection = false;
  const CountHeader& first = *counts_of(c, 0).header;
#pragma unroll 1
  for (int rank = static_cast<int>(blockDim.x) - 1 - static_cast<int>(threadIdx.x); rank < c.num_ranks();
       rank += blockDim.x) {
    const CountHeader& header = *counts_of(c, rank).header;
    objection = objection || header.tag != first.tag || header.payload_bytes != first.payload_bytes ||
                header.scale_bytes != first.scale_bytes || header.bad_token >= 0;
  }
  return objection;
}

// As Shape::group_rows, by 32-bit division.
__device__ inline int group_rows(const Shape& s, int32_t tokens) {
  if (s.layout == Layout::kPadded) return static_cast<int>(s.expert_capacity);
  const auto unit = static_cast<uint32_t>(s.expert_alignment);
  return static_cast<int>((static_cast<uint32_t>(tokens) + unit - 1) / unit * unit);
}

// Where each expert's group starts at its rank, added to the bases; a warp for each rank.
__device__ inline void start_groups(const Context& c, const BasesArena& arena) {
  const int experts = c.sizes.num_local_experts;
#pragma unroll 1
  for (int rank = warp_idx(); rank < c.num_ranks(); rank += num_warps()) {
    int64_t start = 0;
#pragma unroll 1
    for (int first = 0; first < experts; first += kWarpThreads) {
      const int local = first + lane_idx(), expert = rank * experts + local;
      const int rows = local < experts ? group_rows(c.shape, arena.expert_rows[expert]) : 0;
      int inclusive = rows;
      for (int step = 1; step < kWarpThreads; step *= 2) {
        const int below = __shfl_up_sync(kFullWarp, inclusive, step);
        if (lane_idx() >= step) inclusive += below;
      }
      if (local < experts && c.shape.row_per_expert()) {
        const int32_t offset = static_cast<int32_t>(start) + inclusive - rows;
        arena.expert_bases[expert] += offset;
        const int node_expert = expert - c.sizes.node_first_expert;
#pragma unroll 1
        for (int idx = 0; idx < num_streams(c) && node_expert >= 0 && node_expert < c.sizes.node_num_experts; ++idx) {
          arena.relay_expert_bases[idx * c.sizes.node_num_experts + node_expert] += offset;
        }
        if (rank == c.team.rank) arena.own_offsets[local] = offset;
      }
      start += __shfl_sync(kFullWarp, inclusive, kWarpThreads - 1);
    }
    if (lane_idx() == 0) arena.group_rows[rank] = static_cast<int32_t>(start < INT32_MAX ? start : INT32_MAX);
  }
}

// Whether some rank would receive more than there is room for. With what sum_counts finds this is what deep_a2a::agree
// decides on the host: the same answer from the same counts.
__device__ inline bool overflows(const Context& c, const BasesArena& arena) {
  bool overflow = false;
#pragma unroll 1
  for (int rank = threadIdx.x; c.shape.layout != Layout::kPadded && rank < c.num_ranks(); rank += blockDim.x) {
    const int rows =
        c.shape.row_per_expert() ? max(arena.group_rows[rank], arena.rank_rows[rank]) : arena.rank_rows[rank];
    overflow = overflow || rows > c.sizes.slot_rows;
  }
#pragma unroll 1
  for (int expert = threadIdx.x; c.shape.layout == Layout::kPadded && expert < c.shape.num_experts;
       expert += blockDim.x) {
    overflow = overflow || arena.expert_rows[expert] > c.shape.expert_capacity;
  }
  return overflow;
}

// What this rank will receive, into `block` of ReceivedCounts; all threads of one block.
__device__ inline void write_counts(const Context& c, const BasesArena& arena, int32_t* block) {
  const ReceivedCounts to = ReceivedCounts::at(c.shape, block);
  const int experts = c.sizes.num_local_experts, first = c.sizes.first_expert;
#pragma unroll 1
  for (int expert = threadIdx.x; expert < c.shape.num_experts; expert += blockDim.x) {
    to.expert_load[expert] = arena.expert_rows[expert];
  }
#pragma unroll 1
  for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) {
    to.rows_per_expert[expert] = arena.expert_rows[first + expert];
    if (c.shape.row_per_expert()) to.expert_offsets[expert] = arena.own_offsets[expert];
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < c.num_ranks(); source += blockDim.x) {
    to.rows_per_rank[source] = arena.received_rows[source];
  }
  if (threadIdx.x != 0) return;
  if (c.shape.row_per_expert()) to.expert_offsets[experts] = arena.group_rows[c.team.rank];
  to.num_received[0] = c.shape.row_per_expert() ? arena.group_rows[c.team.rank] : arena.rank_rows[c.team.rank];
  to.num_received[1] = arena.rank_rows[c.team.rank];
}

// A host that waits for the sizes goes on from here. None waits for a launch in a graph, which has no ticket.
__device__ inline void report_counts(const Context& c, uint64_t ticket, int32_t num_rows, int32_t num_rank_rows) {
  if (ticket == 0) return;
  CountReport& report = c.team.mailbox->counts[c.lane];
  report.num_rows = num_rows;
  report.num_rank_rows = num_rank_rows;
  ptx::st_release_sys(&report.ticket, ticket);
}

// The count vectors, for the host to say why; a refusal stays until the host has read it. All threads of one block.
__device__ inline void report_refusal(const Context& c) {
  RefusalReport& report = c.team.mailbox->refusals[c.lane];
  const bool tells = threadIdx.x == 0 && ptx::ld_acquire_sys(&report.read) == c.control.refusals;
  if (!__syncthreads_or(tells)) return;
  const int64_t bytes = c.num_ranks() * c.sizes.counts_bytes;
  const auto* from = reinterpret_cast<const int32_t*>(c.own(Region::kCounts, c.lane));
  auto* to = reinterpret_cast<int32_t*>(c.team.refused_counts + c.lane * bytes);
  for (int64_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) to[i] = ptx::ld_relaxed_sys(from + i);
  __syncthreads();
  if (threadIdx.x == 0) ptx::st_release_sys(&report.told, ++c.control.refusals);
}

// All of D3 after the wait. Sets shared.refused. Afterwards only the first arrays of the arena may be looked at.
__device__ inline void d3_bases(const Context& c, const DispatchTask& t, const BasesArena& arena) {
  const bool objection = objects(c);
  sum_counts(c, arena);
  __syncthreads();
  if (c.shape.row_per_expert()) {
    start_groups(c, arena);
    __syncthreads();
  }
  const bool refused = __syncthreads_or(objection || overflows(c, arena)) != 0;
  if (threadIdx.x == 0) {
    c.shared.refused = refused;
    c.shared.num_rank_rows = arena.rank_rows[c.team.rank];
    c.shared.num_rows = c.shape.row_per_expert() ? arena.group_rows[c.team.rank] : c.shared.num_rank_rows;
  }
  if (blockIdx.x != 0) return;
  if (refused) {
    report_refusal(c);
  } else {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) write_counts(c, arena, i == 0 ? t.kept.counts : t.result.counts);
    const int local = static_cast<int>(threadIdx.x);
    if (local < c.num_locals()) {
      t.source.rank_bases[local] = c.shared.rank_bases[local];
      t.source.rank_rows[local] = arena.sent_rows[local];
    }
#pragma unroll 1
    for (int idx = threadIdx.x; idx < num_streams(c); idx += blockDim.x) {
      const Stream stream = stream_of(c, idx);
      t.source.stream_counts[idx] = ptx::ld_relaxed_sys(counts_of(c, c.team.rank).node_rows + stream.node);
      if (c.sizes.num_rounds == 1) {
        t.relay.round_rows[idx] = ptx::ld_relaxed_sys(counts_of(c, stream.peer).node_rows + c.own_node());
      }
    }
  }
}

}  // namespace deep_a2a::cuda
