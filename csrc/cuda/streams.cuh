// Streams of rows between rail peers: where they lie, and how their chunks are put. wait_chunk() is in sync.cuh.
#pragma once

#include "cuda/context.cuh"
#include "cuda/network.cuh"

namespace deep_a2a::cuda {

// What this rank exchanges with its rail peer on one other node.
struct Stream {
  int idx;
  int at_peer;  // its index at the peer
  int node;
  int peer;  // rank
  int pe;
};

__device__ inline int num_streams(const Context& c) { return kHasNetwork ? c.sizes.num_nodes - 1 : 0; }

__device__ inline Stream stream_of(const Context& c, int idx) {
  const Topology& topology = c.shape.topology;
  const int own = c.own_node();
  const int node = topology.stream_node(own, idx);
  return {idx, topology.stream_idx(node, own), node, topology.rank_of(node, c.local_rank()), c.team.rail_pes[node]};
}

__device__ inline int64_t stream_offset(const Context& c, int idx) {
  return int64_t{idx} * c.shape.max_tokens * StreamRow::max_bytes(c.shape);
}
__device__ inline char* net_in(const Context& c, int idx) {
  return c.own(Region::kNetIn, c.lane) + stream_offset(c, idx);
}
__device__ inline char* net_out(const Context& c, int idx) {
  return c.own(Region::kNetOut, c.lane) + stream_offset(c, idx);
}
__device__ inline int chunk_rows(const Context& c) { return rows_per_chunk(c.shape); }

// All lanes of a warp. Rows [first_row, end_row) of net_out are one chunk; whoever has written them has synchronised
// with this warp.
__device__ inline void put_chunk(const Context& c, const Stream& stream, int chunk, int first_row, int end_row,
                                 int64_t row_bytes) {
  if constexpr (kHasNetwork) {
    const int64_t start = first_row * row_bytes;
    put_signal_warp(net_in(c, stream.at_peer) + start, net_out(c, stream.idx) + start, end_row * row_bytes - start,
                    c.own_word(Region::kChunkFlag, int64_t{stream.at_peer} * max_chunks(c.shape) + chunk),
                    Tag::word(c.epoch, c.tag), stream.pe);
  }
}

}  // namespace deep_a2a::cuda
