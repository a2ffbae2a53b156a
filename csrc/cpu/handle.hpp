// All that a rank knows about one dispatch, as source, receiver and relay. Combine and cached dispatch need nothing
// else.
#pragma once

#include <cstdint>
#include <vector>

#include "protocol/wire.hpp"

namespace deep_a2a::cpu {

// What a receiver knows: [num_rank_rows, num_topk] unless noted; sized when the counts are known, filled at arrival.
struct Received {
  int64_t num_rows = 0;
  int64_t num_rank_rows = 0;
  std::vector<int32_t> num_received;  // num_rows, num_rank_rows
  std::vector<int32_t> topk_idx;
  std::vector<float> topk_weights;
  std::vector<int32_t> expert_rows;
  std::vector<int32_t> rows_per_rank;    // [num_ranks]
  std::vector<int32_t> rows_per_expert;  // [num_local_experts]
  std::vector<int32_t> expert_offsets;   // [num_local_experts + 1]
  std::vector<int32_t> expert_load;      // [num_experts], all ranks together
};

// Which rows of a stream its rounds have: [num_rounds + 1] first rows, and the end of the last round.
using RoundStarts = std::vector<int32_t>;
inline int round_rows(const RoundStarts& starts, int round) { return starts[round + 1] - starts[round]; }

struct Handle {
  // Source: [num_tokens, num_topk]. Rows of entries for the own node are final, those for other nodes are places.
  int num_tokens = 0;
  std::vector<RouteEntry> routes;
  std::vector<int32_t> stream_rows;       // the token's row in the stream to the slot's node; -1: own node or no expert
  std::vector<RoundStarts> round_starts;  // by stream

  Received received;

  // Relay: by stream, [rows of the stream, num_topk] with final rows.
  std::vector<std::vector<RouteEntry>> relay_routes;
  std::vector<RoundStarts> relay_round_starts;
};

}  // namespace deep_a2a::cpu
