// The sizes of a buffer: given once at construction, the same on every rank.
#pragma once

#include <cstdint>

#include "common/check.hpp"
#include "common/macros.hpp"
#include "protocol/topology.hpp"

namespace deep_a2a {

enum class Layout : int { kRank = 0, kExpert = 1, kPadded = 2 };

constexpr int kRowAlignment = 16;     // bytes; the unit of bulk copies
constexpr int kScaleAlignment = 128;  // bytes; so that small bulk copies start at whole lines
constexpr int kScaleGroupChannels = 128;
constexpr int kMaxTopk = 32;
constexpr int kMaxSlots = 64;
constexpr int kMaxLanes = 16;
constexpr int kStagedRounds = 2;  // that have room between rail peers: one is filled while another is drained
constexpr int kMaxRounds = 256;
constexpr int kMaxRoundTokens = 4095;               // with several rounds: a word has 12 bits for the rows of one
constexpr int64_t kDefaultChunkBytes = 256 * 1024;  // large enough to hide the cost of a put, small enough to pipeline

struct Shape {
  Topology topology;
  Layout layout = Layout::kRank;
  int hidden = 0;
  int num_experts = 0;
  int num_topk = 0;
  int max_tokens = 0;           // num_max_tokens_per_rank
  int expert_alignment = 1;     // layout kExpert
  int64_t expert_capacity = 0;  // layout kPadded: rows per local expert
  int64_t max_recv_rows = 0;    // rows of a slot; 0 asks for the worst case
  int num_slots = 2;
  int num_lanes = 2;
  int64_t chunk_bytes = kDefaultChunkBytes;  // a chunk has as many rows as fit, at least one
  int round_tokens = 0;                      // of a source, whose rows go between nodes in one round; 0 for all in one

  DEEP_A2A_HOST_DEVICE int num_local_experts() const { return num_experts / topology.num_ranks; }
  DEEP_A2A_HOST_DEVICE int experts_per_node() const { return num_local_experts() * topology.ranks_per_node; }
  DEEP_A2A_HOST_DEVICE int rank_of_expert(int expert) const { return expert / num_local_experts(); }
  DEEP_A2A_HOST_DEVICE int node_of_expert(int expert) const { return expert / experts_per_node(); }

  // Round k of a source has its tokens [k * tokens_per_round(), (k + 1) * tokens_per_round()).
  DEEP_A2A_HOST_DEVICE int tokens_per_round() const { return round_tokens > 0 ? round_tokens : max_tokens; }
  DEEP_A2A_HOST_DEVICE int num_rounds() const { return ceil_div(max_tokens, tokens_per_round()); }
  // Rows of one stream that have room at a time, and the first of them for a round.
  DEEP_A2A_HOST_DEVICE int staged_rows() const {
    return tokens_per_round() * (num_rounds() < kStagedRounds ? num_rounds() : kStagedRounds);
  }
  DEEP_A2A_HOST_DEVICE int first_staged_row(int round) const { return round % kStagedRounds * tokens_per_round(); }

  DEEP_A2A_HOST_DEVICE int64_t all_tokens() const { return int64_t{topology.num_ranks} * max_tokens; }

  // Rows of `x` that an expert's group takes at its rank.
  DEEP_A2A_HOST_DEVICE int64_t group_rows(int64_t tokens) const {
    if (layout == Layout::kRank) return 0;
    return layout == Layout::kPadded ? expert_capacity : align_up<int64_t>(tokens, expert_alignment);
  }
  // Rows of `x` in a slot.
  DEEP_A2A_HOST_DEVICE int64_t slot_rows() const {
    if (layout == Layout::kPadded) return expert_capacity * num_local_experts();
    if (max_recv_rows == 0) return worst_case_rows();
    return layout == Layout::kRank && max_recv_rows > all_tokens() ? all_tokens() : max_recv_rows;
  }
  DEEP_A2A_HOST_DEVICE int64_t worst_case_rows() const {
    if (layout == Layout::kRank) return all_tokens();
    const int experts_hit = num_topk < num_local_experts() ? num_topk : num_local_experts();
    return all_tokens() * experts_hit + int64_t{num_local_experts()} * (expert_alignment - 1);
  }
  // Rank rows of a slot: never more than its rows, since each has at least one expert row.
  DEEP_A2A_HOST_DEVICE int64_t slot_rank_rows() const {
    return slot_rows() < all_tokens() ? slot_rows() : all_tokens();
  }

  // Of `x` as received; otherwise a row per (token, rank).
  DEEP_A2A_HOST_DEVICE bool row_per_expert() const { return layout != Layout::kRank; }

  DEEP_A2A_HOST_DEVICE int64_t max_payload_bytes() const { return int64_t{hidden} * 2; }
  DEEP_A2A_HOST_DEVICE int num_scale_groups() const { return ceil_div(hidden, kScaleGroupChannels); }
  DEEP_A2A_HOST_DEVICE int64_t max_scale_bytes() const {
    return align_up<int64_t>(int64_t{num_scale_groups()} * 4, kScaleAlignment);
  }
};

// The one place where limits are enforced. Throws with the argument, its value and what was expected.
inline void validate(const Shape& s) {
  const Topology& t = s.topology;
  check_argument(t.num_ranks >= 1, "num_ranks must be at least 1, got ", t.num_ranks);
  check_argument(t.ranks_per_node >= 1 && t.num_ranks % t.ranks_per_node == 0,
                 "ranks_per_node must divide num_ranks = ", t.num_ranks, ", got ", t.ranks_per_node);
  check_argument(s.hidden >= 8 && s.hidden % 8 == 0,
                 "hidden must be a positive multiple of 8 (BF16 rows of whole 16 bytes), got ", s.hidden);
  check_argument(s.hidden <= (1 << 20), "hidden must be at most 1048576, got ", s.hidden);
  check_argument(s.num_experts >= 1 && s.num_experts % t.num_ranks == 0,
                 "num_experts must be a positive multiple of num_ranks = ", t.num_ranks, ", got ", s.num_experts);
  check_argument(s.num_topk >= 1 && s.num_topk <= kMaxTopk, "num_topk must be between 1 and ", kMaxTopk, ", got ",
                 s.num_topk);
  check_argument(s.num_topk <= s.num_experts, "num_topk must be at most num_experts = ", s.num_experts, ", got ",
                 s.num_topk);
  check_argument(s.max_tokens >= 1, "num_max_tokens_per_rank must be at least 1, got ", s.max_tokens);
  check_argument(s.expert_alignment >= 1, "expert_alignment must be at least 1, got ", s.expert_alignment);
  check_argument(s.layout == Layout::kExpert || s.expert_alignment == 1,
                 "expert_alignment is for layout \"expert\" alone, got ", s.expert_alignment);
  check_argument(s.layout != Layout::kExpert ||
                     int64_t{s.num_local_experts()} * s.expert_alignment + s.all_tokens() * s.num_topk <= INT32_MAX,
                 "expert_alignment = ", s.expert_alignment, " is too large: rows of all experts must fit 31 bits");
  check_argument(s.layout == Layout::kPadded ? s.expert_capacity >= 1 : s.expert_capacity == 0,
                 "expert_capacity must be at least 1 with layout \"padded\" and absent otherwise, got ",
                 s.expert_capacity);
  check_argument(s.max_recv_rows >= 0 && (s.layout != Layout::kPadded || s.max_recv_rows == 0),
                 "max_recv_rows must be positive, and absent with layout \"padded\" (see expert_capacity), got ",
                 s.max_recv_rows);
  check_argument(s.all_tokens() * s.num_topk <= INT32_MAX,
                 "num_ranks * num_max_tokens_per_rank * num_topk must fit 31 bits, got ", s.topology.num_ranks, " * ",
                 s.max_tokens, " * ", s.num_topk);
  check_argument(
      s.slot_rows() <= INT32_MAX, "a slot of ", s.slot_rows(),
      " rows is too large (at most 2147483647): lower num_max_tokens_per_rank, max_recv_rows or expert_capacity");
  check_argument(s.num_slots >= 1 && s.num_slots <= kMaxSlots, "num_slots must be between 1 and ", kMaxSlots, ", got ",
                 s.num_slots);
  check_argument(s.round_tokens >= 0, "round_tokens must be at least 0, got ", s.round_tokens);
  check_argument(s.num_rounds() == 1 || s.round_tokens <= kMaxRoundTokens, "round_tokens must be at most ",
                 kMaxRoundTokens, " or all tokens, got ", s.round_tokens);
  check_argument(s.num_rounds() <= kMaxRounds, "round_tokens must divide ", s.max_tokens, " tokens into at most ",
                 kMaxRounds, " rounds, got ", s.round_tokens);
  check_argument(s.chunk_bytes >= 1, "chunk_bytes must be at least 1, got ", s.chunk_bytes);
  check_argument(s.num_lanes >= 1 && s.num_lanes <= kMaxLanes, "num_lanes must be between 1 and ", kMaxLanes, ", got ",
                 s.num_lanes);
}

}  // namespace deep_a2a
