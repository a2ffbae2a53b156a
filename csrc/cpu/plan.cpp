#include "cpu/plan.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace deep_a2a::cpu {
namespace {

int64_t read_expert(const DispatchArgs& args, int64_t idx) {
  return args.topk_idx_bytes == 8 ? static_cast<const int64_t*>(args.topk_idx)[idx]
                                  : static_cast<const int32_t*>(args.topk_idx)[idx];
}

template <class Class>
int first_slot_of(const RouteEntry* entries, int slot, Class&& class_of) {
  const int wanted = class_of(entries[slot].expert);
  for (int earlier = 0; earlier < slot; ++earlier) {
    if (entries[earlier].expert >= 0 && class_of(entries[earlier].expert) == wanted) return earlier;
  }
  return slot;
}

// Rows ascend with the tokens, so a round ends behind the last row of its tokens.
std::vector<RoundStarts> find_rounds(const Shape& s, int node, const Handle& handle) {
  std::vector<RoundStarts> starts(static_cast<size_t>(s.topology.num_peer_nodes()),
                                  RoundStarts(static_cast<size_t>(s.num_rounds()) + 1, 0));
  for (size_t entry = 0; entry < handle.stream_rows.size(); ++entry) {
    if (handle.stream_rows[entry] < 0) continue;
    const int round = static_cast<int>(entry / s.num_topk) / s.tokens_per_round();
    const int stream = s.topology.stream_idx(node, s.node_of_expert(handle.routes[entry].expert));
    int32_t& end = starts[stream][round + 1];
    end = std::max(end, handle.stream_rows[entry] + 1);
  }
  for (RoundStarts& stream : starts) {
    for (size_t round = 1; round < stream.size(); ++round) stream[round] = std::max(stream[round], stream[round - 1]);
  }
  return starts;
}

}  // namespace

void count_tokens(const Shape& s, int node, const DispatchArgs& args, uint32_t tag, Handle& handle,
                  CountVector counts) {
  const int topk = s.num_topk;
  const size_t entries = static_cast<size_t>(args.num_tokens) * topk;
  handle.num_tokens = args.num_tokens;
  handle.routes.assign(entries, {-1, 0.0f, -1, -1});
  handle.stream_rows.assign(entries, -1);
  std::memset(counts.header, 0, static_cast<size_t>(CountVector::bytes(s)));
  *counts.header = {
      args.num_tokens, args.format.payload_bytes, args.format.scale_bytes, static_cast<int32_t>(tag), -1, 0, 0};

  for (int token = 0; token < args.num_tokens; ++token) {
    RouteEntry* route = &handle.routes[static_cast<size_t>(token) * topk];
    int32_t* stream_rows = &handle.stream_rows[static_cast<size_t>(token) * topk];
    for (int slot = 0; slot < topk; ++slot) {
      const int64_t idx = int64_t{token} * topk + slot;
      const int64_t expert = read_expert(args, idx);
      if (expert < -1 || expert >= s.num_experts) {
        if (counts.header->bad_token < 0) {
          counts.header->bad_token = token;
          counts.header->bad_topk = slot;
          counts.header->bad_expert = expert;
        }
        continue;
      }
      if (expert < 0) continue;
      RouteEntry& entry = route[slot];
      entry.expert = static_cast<int32_t>(expert);
      entry.weight = args.topk_weights != nullptr ? args.topk_weights[idx] : 1.0f;
      entry.expert_row = counts.expert_rows[expert]++;
      const int same_rank = first_slot_of(route, slot, [&](int e) { return s.rank_of_expert(e); });
      entry.rank_row =
          same_rank < slot ? route[same_rank].rank_row : counts.rank_rows[s.rank_of_expert(entry.expert)]++;
      const int to_node = s.node_of_expert(entry.expert);
      const int same_node = first_slot_of(route, slot, [&](int e) { return s.node_of_expert(e); });
      if (to_node == node) continue;
      stream_rows[slot] = same_node < slot ? stream_rows[same_node] : counts.node_rows[to_node]++;
    }
  }
  handle.round_starts = find_rounds(s, node, handle);
}

Bases::Bases(const Shape& s, int node, const AllCounts& counts)
    : first_expert_(node * s.experts_per_node()),
      ranks_(s.topology.ranks_per_node),
      experts_(s.experts_per_node()),
      experts_per_rank_(s.num_local_experts()),
      rank_bases_(static_cast<size_t>(s.topology.num_ranks) * ranks_),
      expert_bases_(static_cast<size_t>(s.topology.num_ranks) * experts_) {
  const std::vector<int64_t> tokens = tokens_per_expert(s, counts);
  std::vector<int32_t> rank_rows(static_cast<size_t>(ranks_), 0);
  std::vector<int32_t> expert_rows(static_cast<size_t>(experts_), 0);
  for (int local = 0; local < ranks_; ++local) {
    int64_t start = 0;
    for (int expert = local * experts_per_rank_; expert < (local + 1) * experts_per_rank_; ++expert) {
      expert_rows[expert] = static_cast<int32_t>(start);
      start += s.group_rows(tokens[first_expert_ + expert]);
    }
  }
  for (int source = 0; source < s.topology.num_ranks; ++source) {
    const CountVector vector = counts.of(source);
    for (int local = 0; local < ranks_; ++local) {
      rank_bases_[source * ranks_ + local] = rank_rows[local];
      rank_rows[local] += vector.rank_rows[s.topology.rank_of(node, local)];
    }
    for (int expert = 0; expert < experts_; ++expert) {
      expert_bases_[source * experts_ + expert] = expert_rows[expert];
      expert_rows[expert] += vector.expert_rows[first_expert_ + expert];
    }
  }
}

Received count_received(const Shape& s, int rank, const AllCounts& counts, bool fixed_shapes) {
  Received received;
  const std::vector<int64_t> tokens = tokens_per_expert(s, counts);
  const auto own = tokens.begin() + rank * s.num_local_experts();
  received.expert_load.assign(tokens.begin(), tokens.end());
  received.rows_per_expert.assign(own, own + s.num_local_experts());
  for (int source = 0; source < s.topology.num_ranks; ++source) {
    received.rows_per_rank.push_back(counts.of(source).rank_rows[rank]);
  }
  received.expert_offsets.assign(1, 0);
  for (const int64_t expert_tokens : received.rows_per_expert) {
    received.expert_offsets.push_back(received.expert_offsets.back() +
                                      static_cast<int32_t>(s.group_rows(expert_tokens)));
  }
  received.num_rank_rows = std::accumulate(received.rows_per_rank.begin(), received.rows_per_rank.end(), int64_t{0});
  received.num_rows = s.layout == Layout::kRank ? received.num_rank_rows : received.expert_offsets.back();
  received.num_received = {static_cast<int32_t>(received.num_rows), static_cast<int32_t>(received.num_rank_rows)};
  const auto entries = static_cast<size_t>((fixed_shapes ? s.slot_rank_rows() : received.num_rank_rows) * s.num_topk);
  received.topk_idx.assign(entries, -1);
  received.topk_weights.assign(entries, 0.0f);
  received.expert_rows.assign(entries, -1);
  return received;
}

}  // namespace deep_a2a::cpu
