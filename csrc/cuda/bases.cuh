// D3 bases: from the counts of all ranks, where this source's rows start everywhere on the node, where those of every
// source start at this rank, and whether the dispatch may go ahead at all. Every block works this out for itself.
#pragma once

#include "cuda/exchange.cuh"

namespace deep_a2a::cuda {

// The counters of D3 in the arena. The first five stay until the rows have come.
struct BasesArena {
  int32_t* source_starts;  // [ranks + 1], the first rank row at this rank of each source, and the end of the last one's
  int32_t* own_offsets;    // [local experts], where their groups start at this rank; these two only with rows by expert
  int32_t* source_bases;  // [ranks + 1, local experts], where each source's rows start in them; the rows of all sources
  int32_t* relay_rank_bases;    // [streams, ranks of the node], where the rank rows of a rail peer start at each
  int32_t* relay_expert_bases;  // [streams, experts of the node], and its expert rows
  int32_t* rank_rows;           // [ranks], rank rows that each rank receives
  int32_t* expert_rows;         // [experts], behind them: of all sources
  int32_t* group_rows;          // [ranks], rows of `x` that each rank receives
  int32_t* sent_rows;           // [ranks of the node], that this rank sends to each

  __device__ BasesArena(const Context& c, const DispatchPlan& plan) {
    source_starts = reinterpret_cast<int32_t*>(c.arena);
    own_offsets = source_starts + c.num_ranks() + 1;
    source_bases = own_offsets + (c.per_expert ? c.sizes.num_local_experts : 0);
    relay_rank_bases = source_bases + (c.per_expert ? c.shape.num_experts + c.sizes.num_local_experts : 0);
    relay_expert_bases = relay_rank_bases + num_streams(c) * c.num_locals();
    rank_rows = reinterpret_cast<int32_t*>(c.arena + plan.ring_offset);
    expert_rows = rank_rows + c.num_ranks();
    group_rows = expert_rows + c.shape.num_experts;
    sent_rows = group_rows + c.num_ranks();
  }
};

// What one column of the count vectors, a rank or an expert, leaves behind beside its sum. Null for nothing.
struct ColumnBases {
  int32_t* before = nullptr;   // rows of the sources before this one
  int32_t* relays = nullptr;   // for each stream, of the sources before its rail peer
  int stride = 0;              // of these
  int32_t* sources = nullptr;  // for each source, of those before it; behind the last, of all
  int source_stride = 0;

  __device__ ColumnBases(const Context& c, const BasesArena& arena, int column) {
    const int ranks = c.num_ranks(), expert = column - ranks;
    if (column == c.team.rank) {
      sources = arena.source_starts;
      source_stride = 1;
    } else if (c.per_expert && c.is_own_expert(expert)) {
      sources = arena.source_bases + expert - c.sizes.first_expert;
      source_stride = c.sizes.num_local_experts;
    }
    if (column < ranks) {
      const int local = column - c.neighbour(0);
      if (static_cast<uint32_t>(local) >= static_cast<uint32_t>(c.num_locals())) return;
      before = c.shared.rank_bases + local;
      relays = arena.relay_rank_bases + local;
      stride = c.num_locals();
    } else if (c.per_expert) {
      const int on_node = expert - c.sizes.node_first_expert;
      if (static_cast<uint32_t>(on_node) >= static_cast<uint32_t>(c.sizes.node_num_experts)) return;
      relays = arena.relay_expert_bases + on_node;
      stride = c.sizes.node_num_experts;
    }
  }
};

// Sums over the sources, a thread for each rank and each expert, as their counts come. False where the kernel has to be
// left.
__device__ inline bool sum_counts(const Context& c, const BasesArena& arena) {
  constexpr int kTogether = 4;
  const int ranks = c.num_ranks();
  bool ok = true;
#pragma unroll 1
  for (int column = threadIdx.x; column < ranks + c.shape.num_experts; column += blockDim.x) {
    const ColumnBases bases(c, arena, column);
    const int idx = rank_rows_idx(c, column);  // experts lie behind ranks there, too
    int32_t before = 0, all = 0, own = 0;
    int rail = num_streams(c) > 0 && bases.relays != nullptr ? c.local_rank() : ranks, node = 0;
#pragma unroll 1
    for (int first = 0; first < ranks; first += kTogether) {
      uint64_t words[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        words[i] = ptx::ld_relaxed_sys(c.count_word(c.local_rank(), min(first + i, ranks - 1), idx));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int source = first + i;
        if (source >= ranks) break;
        const int32_t rows = wait_count(c, source, idx, words[i], ok);
        if (source == c.team.rank) before = all, own = rows;
        if (kHasNetwork && source == rail) {
          if (node != c.own_node()) bases.relays[stream_to(c, node) * bases.stride] = all;
          rail += c.num_locals();
          ++node;
        }
        if (bases.sources != nullptr) bases.sources[source * bases.source_stride] = all;
        all += rows;
      }
    }
    arena.rank_rows[column] = all;
    if (bases.sources != nullptr) bases.sources[ranks * bases.source_stride] = all;
    if (bases.before != nullptr) *bases.before = before;
    if (column < ranks && bases.before != nullptr) arena.sent_rows[column - c.neighbour(0)] = own;
  }
  return ok;
}

// Agreement: whether the headers of two ranks differ, or one has an objection of its own; a word of a header for each
// of the last threads. False in `ok` where the kernel has to be left.
__device__ inline bool d3_objects(const Context& c, bool& ok) {
  constexpr int kFirst = offsetof(CountHeader, payload_bytes) / 4, kBadToken = offsetof(CountHeader, bad_token) / 4;
  constexpr int kCompared = kBadToken - kFirst + 1;
  bool objection = false;
#pragma unroll 1
  for (int i = static_cast<int>(blockDim.x - 1 - threadIdx.x); i < c.num_ranks() * kCompared; i += blockDim.x) {
    const int rank = i / kCompared, idx = kFirst + i % kCompared;
    const int32_t value = wait_count(c, rank, idx, ok);
    objection = objection || (idx == kBadToken ? value >= 0 : value != wait_count(c, 0, idx, ok));
  }
  return objection;
}

// As Shape::group_rows, by 32-bit division.
__device__ inline int group_rows(const Shape& s, int32_t tokens) {
  if (s.layout == Layout::kPadded) return static_cast<int>(s.expert_capacity);
  const auto unit = static_cast<uint32_t>(s.expert_alignment);
  return static_cast<int>((static_cast<uint32_t>(tokens) + unit - 1) / unit * unit);
}

// Where each expert's group starts at its rank, added to the bases of rail peers; a warp for each rank.
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
      if (local < experts) {
        const int32_t offset = static_cast<int32_t>(start) + inclusive - rows;
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

// Agreement: whether some rank would receive more than there is room for. With what d3_objects finds this is what
// deep_a2a::agree decides on the host: the same answer from the same counts.
__device__ inline bool d3_overflows(const Context& c, const BasesArena& arena) {
  bool overflow = false;
#pragma unroll 1
  for (int rank = threadIdx.x; c.shape.layout != Layout::kPadded && rank < c.num_ranks(); rank += blockDim.x) {
    const int rows = c.per_expert ? max(arena.group_rows[rank], arena.rank_rows[rank]) : arena.rank_rows[rank];
    overflow = overflow || rows > c.sizes.slot_rows;
  }
#pragma unroll 1
  for (int expert = threadIdx.x; c.shape.layout == Layout::kPadded && expert < c.shape.num_experts;
       expert += blockDim.x) {
    overflow = overflow || arena.expert_rows[expert] > c.shape.expert_capacity;
  }
  return overflow;
}

// What this rank will receive, into the handle; all threads of one block.
__device__ inline void write_counts(const Context& c, const DispatchTask& t, const BasesArena& arena) {
  const ReceivedCounts kept = ReceivedCounts::at(c.shape, t.kept.counts);
  const int experts = c.sizes.num_local_experts, self = c.team.rank;
#pragma unroll 1
  for (int expert = threadIdx.x; expert < c.shape.num_experts; expert += blockDim.x) {
    kept.expert_load[expert] = arena.expert_rows[expert];
    const int own = expert - c.sizes.first_expert;
    if (static_cast<uint32_t>(own) >= static_cast<uint32_t>(experts)) continue;
    kept.rows_per_expert[own] = arena.expert_rows[expert];
    if (c.per_expert) kept.expert_offsets[own] = arena.own_offsets[own];
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < c.num_ranks(); source += blockDim.x) {
    kept.rows_per_rank[source] = arena.source_starts[source + 1] - arena.source_starts[source];
  }
  if (threadIdx.x != 0) return;
  if (c.per_expert) kept.expert_offsets[experts] = arena.group_rows[self];
  kept.num_received[0] = c.per_expert ? arena.group_rows[self] : arena.rank_rows[self];
  kept.num_received[1] = arena.rank_rows[self];
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
  const auto words = static_cast<int>(c.sizes.counts_bytes / 4);
  auto* to = reinterpret_cast<int32_t*>(c.team.refused_counts) + int64_t{c.lane} * c.num_ranks() * words;
  bool ok = true;  // whoever gives up here tells the host, which then does not look at the counts
  for (int i = threadIdx.x; i < c.num_ranks() * values_of_vector(c); i += blockDim.x) {
    const int rank = i / values_of_vector(c), idx = i % values_of_vector(c);
    to[rank * words + idx] = wait_count(c, rank, idx, ok);
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::st_release_sys(&report.told, ++c.control.refusals);
}

// All of D3. Sets shared.refused, the numbers of rows and rank_bases. Afterwards only the first arrays of the arena may
// be looked at. False in all threads where the kernel has to be left, as it has where one is not `ok` before.
__device__ inline bool d3_bases(const Context& c, const DispatchTask& t, const BasesArena& arena, bool ok) {
  const bool objection = d3_objects(c, ok);
  ok = sum_counts(c, arena) && ok;
#pragma unroll 1
  for (int idx = threadIdx.x; idx < num_streams(c); idx += blockDim.x) {
    wait_count(c, stream_of(c, idx).peer, node_rows_idx(c.own_node()), ok);
  }
  if (!all_of_block(ok)) return false;
  if (c.per_expert) {
    start_groups(c, arena);
    __syncthreads();
  }
  const bool refused = __syncthreads_or(objection || d3_overflows(c, arena)) != 0;
  if (threadIdx.x == 0) {
    c.shared.refused = refused;
    c.shared.num_rank_rows = arena.rank_rows[c.team.rank];
    c.shared.num_rows = c.per_expert ? arena.group_rows[c.team.rank] : c.shared.num_rank_rows;
  }
  if (blockIdx.x != 0 || t.half == Half::kReceive) return true;  // whose send half has told and written all this
  if (refused) {
    report_refusal(c);
  } else {
    write_counts(c, t, arena);
    const int local = static_cast<int>(threadIdx.x);
    if (local < c.num_locals()) {
      t.source.rank_bases[local] = c.shared.rank_bases[local];
      t.source.rank_rows[local] = arena.sent_rows[local];
    }
#pragma unroll 1
    for (int idx = threadIdx.x; idx < num_streams(c); idx += blockDim.x) {
      const Stream stream = stream_of(c, idx);
      t.source.stream_counts[idx] = read_count(c, c.team.rank, node_rows_idx(stream.node));
      if (c.sizes.num_rounds == 1) t.relay.round_rows[idx] = rows_for_node(c, stream.peer);
    }
  }
  return true;
}

}  // namespace deep_a2a::cuda
