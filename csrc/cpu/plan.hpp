// D1 and D3 without any communication: counting tokens, computing where rows go.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/handle.hpp"
#include "protocol/agree.hpp"
#include "protocol/args.hpp"

namespace deep_a2a::cpu {

// D1. Fills the source part of `handle` (routes hold places) and the count vector of this rank.
void count_tokens(const Shape& shape, int node, const DispatchArgs& args, uint32_t tag, Handle& handle,
                  CountVector counts);

// D3. Where the rows of each source start, at every rank of one node.
class Bases {
 public:
  Bases(const Shape& shape, int node, const AllCounts& counts);

  // Turns the places of `source` into final rows, for an entry whose expert is on this node.
  void apply(int source, RouteEntry& entry) const {
    const int expert = entry.expert - first_expert_;
    entry.rank_row += rank_bases_[source * ranks_ + expert / experts_per_rank_];
    entry.expert_row += expert_bases_[source * experts_ + expert];
  }
  bool on_node(int expert) const { return expert >= first_expert_ && expert < first_expert_ + experts_; }

 private:
  int first_expert_;
  int ranks_;
  int experts_;
  int experts_per_rank_;
  std::vector<int32_t> rank_bases_;    // [sources, ranks of the node]
  std::vector<int32_t> expert_bases_;  // [sources, experts of the node]
};

// What `rank` will receive. The routing of its rank rows is sized (for the whole slot with `fixed_shapes`), not filled.
Received count_received(const Shape& shape, int rank, const AllCounts& counts, bool fixed_shapes);

}  // namespace deep_a2a::cpu
