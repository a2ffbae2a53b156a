#include "protocol/agree.hpp"

#include <algorithm>

#include "common/check.hpp"
#include "common/errors.hpp"

namespace deep_a2a {
namespace {

template <class... Parts>
std::exception_ptr mismatch(const Parts&... parts) {
  return std::make_exception_ptr(MismatchError(text(parts...)));
}

template <class... Parts>
std::exception_ptr overflow(const Parts&... parts) {
  return std::make_exception_ptr(CapacityError(text(parts...)));
}

// The rank that needs most is named, so that its need is what to ask for.
std::exception_ptr find_overflow(const Shape& s, const AllCounts& counts) {
  const std::vector<int64_t> tokens = tokens_per_expert(s, counts);
  int64_t most_rows = 0, most_tokens = 0;
  int fullest_rank = 0, fullest_expert = 0;
  for (int rank = 0; rank < s.topology.num_ranks; ++rank) {
    int64_t rank_rows = 0, rows = 0;
    for (int source = 0; source < s.topology.num_ranks; ++source) rank_rows += counts.of(source).rank_rows[rank];
    for (int local = 0; local < s.num_local_experts(); ++local) {
      const int expert = rank * s.num_local_experts() + local;
      rows += s.group_rows(tokens[expert]);
      if (tokens[expert] > most_tokens) {
        most_tokens = tokens[expert];
        fullest_expert = expert;
      }
    }
    rows = std::max(rows, rank_rows);
    if (rows > most_rows) {
      most_rows = rows;
      fullest_rank = rank;
    }
  }
  if (s.layout == Layout::kPadded) {
    if (most_tokens <= s.expert_capacity) return nullptr;
    return overflow("expert ", fullest_expert, " of rank ", s.rank_of_expert(fullest_expert), " would receive ",
                    most_tokens, " tokens, the most of all, but expert_capacity is ", s.expert_capacity);
  }
  if (most_rows <= s.slot_rows()) return nullptr;
  return overflow("rank ", fullest_rank, " would receive ", most_rows, " rows, the most of all, but max_recv_rows is ",
                  s.slot_rows());
}

}  // namespace

std::vector<int64_t> tokens_per_expert(const Shape& s, const AllCounts& counts) {
  std::vector<int64_t> tokens(static_cast<size_t>(s.num_experts), 0);
  for (int source = 0; source < s.topology.num_ranks; ++source) {
    const int32_t* rows = counts.of(source).expert_rows;
    for (int expert = 0; expert < s.num_experts; ++expert) tokens[expert] += rows[expert];
  }
  return tokens;
}

Verdict agree(const Shape& s, const AllCounts& counts) {
  const CountHeader& first = *counts.of(0).header;
  for (int rank = 1; rank < s.topology.num_ranks; ++rank) {
    const CountHeader& other = *counts.of(rank).header;
    const int slot = Tag::slot(static_cast<uint32_t>(other.tag)),
              expected = Tag::slot(static_cast<uint32_t>(first.tag));
    if (slot != expected) {
      return {mismatch("rank ", rank, " dispatches into slot ", slot, ", rank 0 into slot ", expected,
                       ": results must be released in the same order on every rank"),
              true};
    }
    if (other.tag != first.tag || other.payload_bytes != first.payload_bytes ||
        other.scale_bytes != first.scale_bytes) {
      return {mismatch("rank ", rank, " dispatches rows of ", other.payload_bytes, " bytes with ", other.scale_bytes,
                       " bytes of scales (format ", other.tag, "), rank 0 rows of ", first.payload_bytes, " with ",
                       first.scale_bytes, " (format ", first.tag, "): x has different dtypes")};
    }
  }
  for (int rank = 0; rank < s.topology.num_ranks; ++rank) {
    const CountHeader& header = *counts.of(rank).header;
    if (header.bad_token >= 0) {
      return {std::make_exception_ptr(std::invalid_argument(
          text("topk_idx[", header.bad_token, ", ", header.bad_topk, "] of rank ", rank, " is ", header.bad_expert,
               ", expected -1 (no expert) or an expert in [0, ", s.num_experts, ")")))};
    }
  }
  return {find_overflow(s, counts)};
}

}  // namespace deep_a2a
