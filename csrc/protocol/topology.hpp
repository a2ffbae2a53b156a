// Who is where: ranks, nodes, and the rail peers that exchange rows between nodes.
#pragma once

#include <cstdint>

#include "common/macros.hpp"

namespace deep_a2a {

template <class Int>
DEEP_A2A_HOST_DEVICE constexpr Int ceil_div(Int value, Int unit) {
  return (value + unit - 1) / unit;
}

template <class Int>
DEEP_A2A_HOST_DEVICE constexpr Int align_up(Int value, Int unit) {
  return ceil_div(value, unit) * unit;
}

struct Topology {
  int num_ranks = 1;
  int ranks_per_node = 1;

  DEEP_A2A_HOST_DEVICE int num_nodes() const { return num_ranks / ranks_per_node; }
  DEEP_A2A_HOST_DEVICE int num_peer_nodes() const { return num_nodes() - 1; }
  DEEP_A2A_HOST_DEVICE int node_of(int rank) const { return rank / ranks_per_node; }
  DEEP_A2A_HOST_DEVICE int local_of(int rank) const { return rank % ranks_per_node; }
  DEEP_A2A_HOST_DEVICE int rank_of(int node, int local_rank) const { return node * ranks_per_node + local_rank; }
  DEEP_A2A_HOST_DEVICE int rail_peer(int rank, int node) const { return rank_of(node, local_of(rank)); }

  // Staging for streams is kept for other nodes only: index of `peer_node` in a window that lies on `owner_node`.
  // Counted from the owner on, so that nodes that walk their streams in this order do not all start at node 0.
  DEEP_A2A_HOST_DEVICE int stream_idx(int owner_node, int peer_node) const {
    return (peer_node - owner_node + num_nodes()) % num_nodes() - 1;
  }
  DEEP_A2A_HOST_DEVICE int stream_node(int owner_node, int stream_idx) const {
    return (owner_node + stream_idx + 1) % num_nodes();
  }
};

}  // namespace deep_a2a
