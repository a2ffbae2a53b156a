// What every kernel of a Buffer is given, by value, and the memory that kernels keep from one launch to the next.
#pragma once

#include <cstdint>

#include "protocol/args.hpp"
#include "protocol/layout.hpp"

namespace deep_a2a::cuda {

#if defined(DEEP_A2A_NETWORK)
constexpr bool kHasNetwork = true;
#else
constexpr bool kHasNetwork = false;  // network.cuh is then declared only
#endif

constexpr int kMaxRanksPerNode = 32;  // a warp has a lane for each
constexpr int kMaxNodes = 256;
constexpr int kWarpThreads = 32;

// What there is a received row for: each token and rank, or each token and expert.
enum class RowsPer : int { kRank, kExpert };
DEEP_A2A_HOST_DEVICE inline RowsPer rows_per(const Shape& s) {
  return s.row_per_expert() ? RowsPer::kExpert : RowsPer::kRank;
}

// Counts of blocks of a launch that have come to a point; the last block of a launch sets them back to zero.
struct GridCounters {
  uint32_t counted;
  uint32_t placed;
  uint32_t readied;
  uint32_t recorded;
  uint32_t sent;
  uint32_t relayed;
  uint32_t left;
  uint32_t parts[kMaxReadyParts];
  uint32_t rounds[kMaxRounds];
  uint32_t moved_rows;     // that warps have taken, of D4 on the own node, of D6 pull, or of C1b and C2
  uint32_t packed_chunks;  // tasks that warps have taken, of D4 to other nodes before D3
  uint32_t moved_chunks;   // and of D5 with what D4 is left
};

// A lane's memory on the GPU: here because a captured graph advances it without the host.
struct LaneControl {
  uint64_t epoch;          // of the operation that began last
  uint64_t refused_epoch;  // of the dispatch that was refused last
  uint64_t refusals;       // that were told to the host
  GridCounters grid;
};

struct SlotControl {
  uint64_t uses;
  uint64_t releases;
};

// The rail peer on another node.
struct Rail {
  char* window;  // as mapped here, where rows are stored there; null where they are put
  int pe;        // its number in the NVSHMEM job
};

struct Control {
  LaneControl lanes[kMaxLanes];
  SlotControl slots[kMaxSlots];
  unsigned long long wire_bytes;     // moved between GPUs of the node so far
  unsigned long long network_bytes;  // put to other nodes so far
  uint32_t fault_reported;           // a thread of this rank has taken it upon itself
  Rail rails[kMaxNodes];             // by node; with one node unused
};

// Pinned host memory that kernels write and the host reads: what a host that waits for counts wants to know, per lane.
constexpr int32_t kRefusedRows = -1;
struct CountReport {
  uint64_t ticket;   // of the launch, written last
  int32_t num_rows;  // kRefusedRows where all ranks refuse the dispatch
  int32_t num_rank_rows;
};

// Of one lane. A kernel tells of a refusal once the host has read of all before; one that comes earlier is not told.
struct RefusalReport {
  uint64_t told;  // how many, written after the count vectors of the refused dispatch
  uint64_t read;  // how many, written by the host
};

struct Mailbox {
  CountReport counts[kMaxLanes];
  RefusalReport refusals[kMaxLanes];
  uint64_t fault_set;  // written after `fault`
  FaultRecord fault;
};

// What follows from shape and rank by division: worked out once on the host, since a GPU has no divider.
struct Sizes {
  int32_t num_nodes;
  int32_t node;
  int32_t local_rank;
  int32_t first_rank;  // of the node
  int32_t num_local_experts;
  int32_t first_expert;  // of this rank
  int32_t node_first_expert;
  int32_t node_num_experts;
  // e * expert_reciprocal >> 32 is e / num_local_experts, for as many experts as can be counted.
  uint64_t expert_reciprocal;
  // i * topk_reciprocal >> 16 is i / num_topk, for the top-k slots of 32 tokens.
  uint32_t topk_reciprocal;
  int64_t slot_rows;
  int64_t counts_bytes;
  int64_t record_bytes;
  // Of streams between nodes.
  int32_t num_rounds;
  int32_t staged_rows;
  int32_t rows_per_chunk;
  int32_t chunks_per_round;
  int64_t stream_row_bytes;  // at most

  static Sizes of(const Shape& s, int rank) {
    const Topology& t = s.topology;
    const int node = t.node_of(rank), experts = s.num_local_experts();
    return {t.num_nodes(),
            node,
            t.local_of(rank),
            t.rank_of(node, 0),
            experts,
            rank * experts,
            node * s.experts_per_node(),
            s.experts_per_node(),
            ((uint64_t{1} << 32) + static_cast<uint64_t>(experts) - 1) / static_cast<uint64_t>(experts),
            static_cast<uint32_t>(ceil_div(1 << 16, s.num_topk)),
            s.slot_rows(),
            CountVector::bytes(s),
            RouteRecord::bytes(s),
            s.num_rounds(),
            s.staged_rows(),
            deep_a2a::rows_per_chunk(s),
            deep_a2a::chunks_per_round(s),
            StreamRow::max_bytes(s)};
  }
};

struct Team {
  Shape shape;
  Sizes sizes;
  WindowLayout layout;
  int rank;
  uint64_t timeout_ns;
  uint64_t delay_seed;  // tests: releases come late, as drawn from it; 0 for never
  Control* control;
  Mailbox* mailbox;
  char* refused_counts;             // behind the mailbox, by lane: the count vectors of all ranks
  char* windows[kMaxRanksPerNode];  // of the ranks of this node, the own one included
};

// Which halves of an operation a launch runs.
enum class Half : int { kSend = 1, kReceive = 2, kBoth = 3 };

// What the source keeps of a dispatch, in one allocation of the caller's: for cached dispatches and for combine.
struct SourceHandle {
  int32_t* experts;        // [num_tokens, num_topk]
  float* weights;          // [num_tokens, num_topk]; in layout kRank alone
  int32_t* expert_places;  // [num_tokens, num_topk]; not in layout kRank
  int32_t* rank_places;    // [num_tokens, ranks_per_node], -1 where none of the rank's experts is wanted
  int32_t* rank_bases;     // [ranks_per_node]: base + place is the rank row
  int32_t* rank_rows;      // [ranks_per_node]: how many go there
  // With several nodes. Streams are those of Topology, to one other node each.
  int32_t* stream_rows;    // [num_tokens, streams]: the token's row in the stream, -1 for none
  int32_t* stream_tokens;  // [streams, num_tokens]: the token of each row
  int32_t* stream_counts;  // [streams]: how many rows
  int32_t* round_starts;   // [streams, rounds]: the row that the round's first token has or would have, if it is there
  int32_t* slot_places;    // [num_tokens, num_topk]: the place at the slot's rank, of slots on other nodes

  // Lays the arrays out from `base` on; returns how many bytes they take.
  int64_t lay_out(const Shape& s, int num_tokens, char* base) {
    int64_t offset = 0;
    const auto take = [&](int64_t words) {
      auto* at = reinterpret_cast<int32_t*>(base + offset);
      offset = align_up<int64_t>(offset + words * 4, kRegionAlignment);
      return at;
    };
    const int64_t entries = int64_t{num_tokens} * s.num_topk;
    rank_bases = take(s.topology.ranks_per_node);
    rank_rows = take(s.topology.ranks_per_node);
    rank_places = take(int64_t{num_tokens} * s.topology.ranks_per_node);
    experts = take(entries);
    weights = reinterpret_cast<float*>(take(s.row_per_expert() ? 0 : entries));
    expert_places = take(s.row_per_expert() ? entries : 0);
    const int streams = s.topology.num_peer_nodes();
    stream_rows = take(int64_t{num_tokens} * streams);
    stream_tokens = take(int64_t{num_tokens} * streams);
    stream_counts = take(streams);
    round_starts = take(int64_t{streams} * s.num_rounds());
    slot_places = take(streams > 0 ? entries : 0);
    return offset;
  }
};

// What a rank keeps of a dispatch as a relay, in one allocation of the caller's: the rows that came from its rail
// peers, by stream, with their final rows on this node.
struct RelayHandle {
  int32_t* round_rows;  // [streams, rounds]
  RouteEntry* routes;   // [streams, rounds, tokens of a round, num_topk]

  // As SourceHandle::lay_out. Nothing with one node.
  int64_t lay_out(const Shape& s, char* base) {
    const int64_t rounds = int64_t{s.topology.num_peer_nodes()} * s.num_rounds();
    round_rows = reinterpret_cast<int32_t*>(base);
    const int64_t offset = align_up<int64_t>(rounds * 4, kRegionAlignment);
    routes = reinterpret_cast<RouteEntry*>(base + offset);
    return offset + rounds * s.tokens_per_round() * s.num_topk * static_cast<int64_t>(sizeof(RouteEntry));
  }
  DEEP_A2A_HOST_DEVICE RouteEntry* routes_of(const Team& team, int stream, int round, int row) const {
    const int64_t first = (int64_t{stream} * team.sizes.num_rounds + round) * team.shape.tokens_per_round();
    return routes + (first + row) * team.shape.num_topk;
  }
};

// What one block has counted: rows per rank, per expert and per stream, and the first bad entry.
struct BlockCounts {
  int32_t* columns;  // ranks, experts, streams
  int32_t* bad_entry;

  DEEP_A2A_HOST_DEVICE static int64_t num_columns(const Shape& s) {
    return int64_t{s.topology.num_ranks} + s.num_experts + s.topology.num_peer_nodes();
  }
  DEEP_A2A_HOST_DEVICE static int64_t words(const Shape& s) { return num_columns(s) + 1; }
  DEEP_A2A_HOST_DEVICE static BlockCounts at(const Shape& s, int32_t* scratch, int block) {
    int32_t* base = scratch + block * words(s);
    return {base, base + num_columns(s)};
  }
};

// The numbers that a receiver knows once it has all counts, as one block of int32.
struct ReceivedCounts {
  int32_t* num_received;     // [2]: rows, rank rows
  int32_t* rows_per_rank;    // [num_ranks]
  int32_t* rows_per_expert;  // [num_local_experts]
  int32_t* expert_offsets;   // [num_local_experts + 1]
  int32_t* expert_load;      // [num_experts]

  DEEP_A2A_HOST_DEVICE static int64_t words(const Shape& s) {
    return int64_t{3} + s.topology.num_ranks + 2 * s.num_local_experts() + s.num_experts;
  }
  DEEP_A2A_HOST_DEVICE static ReceivedCounts at(const Shape& s, int32_t* base) {
    int32_t* per_expert = base + 2 + s.topology.num_ranks;
    int32_t* offsets = per_expert + s.num_local_experts();
    return {base, base + 2, per_expert, offsets, offsets + s.num_local_experts() + 1};
  }
};

// The routing of received rank rows: [capacity, num_topk] each, as one block of int32.
struct ReceivedRouting {
  int32_t* topk_idx;
  float* topk_weights;
  int32_t* expert_rows;  // null in layout kRank
  int32_t* from_row;     // [capacity]; null in layout kRank

  DEEP_A2A_HOST_DEVICE static int64_t words(const Shape& s, int64_t capacity) {
    return capacity * (s.row_per_expert() ? 3 * s.num_topk + 1 : 2 * s.num_topk);
  }
  DEEP_A2A_HOST_DEVICE static ReceivedRouting at(const Shape& s, int64_t capacity, int32_t* base) {
    const int64_t entries = capacity * s.num_topk;
    auto* weights = reinterpret_cast<float*>(base + entries);
    if (!s.row_per_expert()) return {base, weights, nullptr, nullptr};
    return {base, weights, base + 2 * entries, base + 3 * entries};
  }
};

}  // namespace deep_a2a::cuda
