// Every region of a rank's window, listed once. Sizes, offsets, the memory table and the tests come from this list.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "protocol/shape.hpp"
#include "protocol/steps.hpp"
#include "protocol/wire.hpp"

namespace deep_a2a {

enum class Region : int {
  kAbort,
  kFaults,
  kSlotCredit,
  kGone,
  kDoorbell,
  kProgress,
  kLaneCredit,
  kCountsFlag,
  kNetCountsFlag,
  kChunkFlag,
  kChunkCredit,
  kRoutesFlag,
  kSentFlag,
  kRelayedFlag,
  kReadyFlag,
  kReadyPart,
  kCounts,
  kNetCountsIn,
  kNetCountsOut,
  kNetIn,
  kNetOut,
  kInputRows,
  kInputScales,
  kCastRows,
  kRecvRoutes,
  kCombineRows,
  kCombineSide,
  kRecvRows,
  kRecvScales,
  kCount,
};

enum class Scope : int { kOnce, kPerLane, kPerSlot };

constexpr int64_t kWordBytes = 8;
constexpr int64_t kRegionAlignment = 256;

// Calls visit(region, name, scope, bytes of one instance, what it holds) for every region, in the order of the window.
template <class Visit>
void visit_regions(const Shape& s, Visit&& visit) {
  const int64_t ranks = s.topology.num_ranks, locals = s.topology.ranks_per_node, nodes = s.topology.num_nodes();
  const int64_t streams = nodes - 1, counts = CountVector::bytes(s);
  const int64_t stream_rows = streams * s.staged_rows() * StreamRow::max_bytes(s);
  const int64_t rows = s.slot_rows(), rank_rows = s.slot_rank_rows(), topk_bytes = int64_t{s.num_topk} * 4;

  visit(Region::kAbort, "abort", Scope::kOnce, kWordBytes, "abort word");
  visit(Region::kFaults, "faults", Scope::kOnce, ranks * static_cast<int64_t>(sizeof(FaultRecord)), "fault records");
  visit(Region::kSlotCredit, "slot_credit", Scope::kOnce, s.num_slots * locals * kWordBytes, "releases of each slot");
  visit(Region::kGone, "gone", Scope::kOnce, ranks * kWordBytes, "ranks that use this window no more (cuda)");
  visit(Region::kDoorbell, "doorbell", Scope::kPerLane, kWordBytes, "wakes a sleeping lane (cpu)");
  visit(Region::kProgress, "progress", Scope::kPerLane, kWordBytes, "epoch that this rank has begun");
  visit(Region::kLaneCredit, "lane_credit", Scope::kPerLane, 2 * ranks * kWordBytes, "finished epochs of peers");
  visit(Region::kCountsFlag, "counts_flag", Scope::kPerLane, ranks * kWordBytes, "arrival of counts (cpu)");
  visit(Region::kNetCountsFlag, "net_counts_flag", Scope::kPerLane, streams * kWordBytes, "arrival of remote counts");
  visit(Region::kChunkFlag, "chunk_flag", Scope::kPerLane, streams * max_chunks(s) * kWordBytes, "arrival of chunks");
  visit(Region::kChunkCredit, "chunk_credit", Scope::kPerLane,
        s.num_rounds() > kStagedRounds ? streams * max_chunks(s) * kWordBytes : 0, "chunks whose room is free again");
  visit(Region::kRoutesFlag, "routes_flag", Scope::kPerLane, locals * kWordBytes, "routing of rows stored (cuda)");
  visit(Region::kSentFlag, "sent_flag", Scope::kPerLane, locals * kWordBytes, "rows of the node stored");
  visit(Region::kRelayedFlag, "relayed_flag", Scope::kPerLane, locals * kWordBytes, "rows of other nodes stored");
  visit(Region::kReadyFlag, "ready_flag", Scope::kPerLane, locals * kWordBytes, "combine rows readable");
  visit(Region::kReadyPart, "ready_part", Scope::kPerLane,
        s.row_per_expert() ? locals * kMaxReadyParts * kWordBytes : 0, "combine rows readable, in parts (cuda)");
  // On GPUs every value is a word that has the epoch beside it.
  visit(Region::kCounts, "counts", Scope::kPerLane, ranks * counts * 2, "count vectors by source rank");
  visit(Region::kNetCountsIn, "net_counts_in", Scope::kPerLane, streams * counts, "count vectors of rail peers");
  visit(Region::kNetCountsOut, "net_counts_out", Scope::kPerLane, streams > 0 ? counts : 0,
        "own count vector, put source");
  visit(Region::kNetIn, "net_in", Scope::kPerLane, stream_rows, "rows from other nodes");
  visit(Region::kNetOut, "net_out", Scope::kPerLane, stream_rows, "rows to other nodes");
  visit(Region::kInputRows, "input_rows", Scope::kPerLane, s.max_tokens * s.max_payload_bytes(), "lent dispatch input");
  visit(Region::kInputScales, "input_scales", Scope::kPerLane, s.max_tokens * s.max_scale_bytes(),
        "scales of rows that peers pull (cuda)");
  visit(Region::kCastRows, "cast_rows", Scope::kPerLane, s.row_per_expert() ? int64_t{s.max_tokens} * s.hidden : 0,
        "FP8 rows made from the input, for peers to pull (cuda)");
  // On GPUs, where rows are per expert, records lie by source and place.
  visit(Region::kRecvRoutes, "recv_routes", Scope::kPerLane,
        (s.row_per_expert() ? s.all_tokens() : rank_rows) * RouteRecord::bytes(s), "routing of the rank rows");
  // With one node: the sums of every rank for each of this rank's tokens (cuda).
  const int64_t summed_rows = s.row_per_expert() && nodes == 1 ? locals * int64_t{s.max_tokens} : 0;
  visit(Region::kCombineRows, "combine_rows", Scope::kPerLane, std::max(rank_rows, summed_rows) * s.max_payload_bytes(),
        "combine input");
  visit(Region::kCombineSide, "combine_side", Scope::kPerLane, rank_rows * topk_bytes, "combine side payload");
  visit(Region::kRecvRows, "recv_rows", Scope::kPerSlot, rows * s.max_payload_bytes(), "received rows");
  visit(Region::kRecvScales, "recv_scales", Scope::kPerSlot, rows * s.max_scale_bytes(), "their scales");
}

// Offsets of all regions: plain data, passed to kernels by value.
struct WindowLayout {
  struct Extent {
    int64_t offset = 0;
    int64_t stride = 0;  // from one lane's or slot's instance to the next
  };
  Extent extents[static_cast<int>(Region::kCount)];
  int64_t bytes = 0;

  DEEP_A2A_HOST_DEVICE int64_t offset(Region region, int instance = 0) const {
    const Extent& e = extents[static_cast<int>(region)];
    return e.offset + e.stride * instance;
  }
};

inline int num_instances(const Shape& s, Scope scope) {
  return scope == Scope::kPerLane ? s.num_lanes : scope == Scope::kPerSlot ? s.num_slots : 1;
}

inline WindowLayout make_layout(const Shape& s) {
  WindowLayout layout;
  visit_regions(s, [&](Region region, const char*, Scope scope, int64_t bytes, const char*) {
    const int64_t stride = align_up(bytes, kRegionAlignment);
    layout.extents[static_cast<int>(region)] = {layout.bytes, stride};
    layout.bytes += stride * num_instances(s, scope);
  });
  return layout;
}

// Shape::round_tokens for at most so many bytes of `net_in` and `net_out` of a lane: 0 where all rows fit, or without a
// limit (0), else as many tokens as fit.
inline int round_tokens_for(const Shape& s, int64_t staging_bytes) {
  const int64_t token_bytes = 2 * int64_t{s.topology.num_peer_nodes()} * StreamRow::max_bytes(s);
  if (staging_bytes == 0 || s.max_tokens * token_bytes <= staging_bytes) return 0;
  const int64_t most = std::min<int64_t>(staging_bytes / (kStagedRounds * token_bytes), kMaxRoundTokens);
  const int64_t least = ceil_div(s.max_tokens, kMaxRounds);
  const int64_t least_bytes =
      least > kMaxRoundTokens ? s.max_tokens * token_bytes : kStagedRounds * least * token_bytes;
  check_argument(most >= least, "staging_bytes must be at least ", least_bytes, " for ", s.max_tokens, " tokens to ",
                 s.topology.num_peer_nodes(), " other nodes in at most ", kMaxRounds, " rounds, got ", staging_bytes);
  return static_cast<int>(most);
}

}  // namespace deep_a2a
