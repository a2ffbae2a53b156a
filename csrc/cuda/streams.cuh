// Streams of rows between rail peers: where they lie, and how their chunks are put. Waits are in sync.cuh.
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
  char* window;  // of the peer, where rows are stored there; null where they are put
};

__device__ inline int num_streams(const Context& c) { return kHasNetwork ? c.sizes.num_nodes - 1 : 0; }

// As Topology::stream_idx and stream_node, without division.
__device__ inline int stream_to(const Context& c, int node) {
  const int ahead = node - c.own_node();
  return (ahead > 0 ? ahead : ahead + c.sizes.num_nodes) - 1;
}
__device__ inline int node_of_stream(const Context& c, int idx) {
  const int node = c.own_node() + idx + 1;
  return node < c.sizes.num_nodes ? node : node - c.sizes.num_nodes;
}

__device__ inline Stream stream_of(const Context& c, int idx) {
  const int node = node_of_stream(c, idx);
  return {idx,
          c.sizes.num_nodes - 2 - idx,
          node,
          node * c.num_locals() + c.local_rank(),
          c.team.control->rails[node].pe,
          c.team.control->rails[node].window};
}

// Some rows of a round of a stream. Rows count from the first of the round.
struct Chunk {
  int stream;
  int round;
  int idx;  // among those of the round
  int round_rows;

  __device__ int first_row(const Context& c) const { return idx * c.sizes.rows_per_chunk; }
  __device__ int rows(const Context& c) const { return min(round_rows - first_row(c), c.sizes.rows_per_chunk); }
};

// Of a chunk's word among those of its region, at a rank that has the stream as number `stream`.
__device__ inline int64_t chunk_word_idx(const Context& c, int stream, int round, int idx) {
  return (int64_t{stream} * c.sizes.num_rounds + round) * c.sizes.chunks_per_round + idx;
}

// Where a row of a round lies in kNetIn or kNetOut, from the window's start.
__device__ inline int64_t staged_offset(const Context& c, Region region, int stream, int round, int row,
                                        int64_t row_bytes) {
  return c.team.layout.offset(region, c.lane) + int64_t{stream} * c.sizes.staged_rows * c.sizes.stream_row_bytes +
         (c.shape.first_staged_row(round) + row) * row_bytes;
}

// A row that has come.
__device__ inline char* row_in(const Context& c, int stream, int round, int row, int64_t row_bytes) {
  return c.team.windows[c.local_rank()] + staged_offset(c, Region::kNetIn, stream, round, row, row_bytes);
}

// Where a row to be sent is written: to the peer at once where its memory is mapped here.
__device__ inline char* row_out(const Context& c, const Stream& stream, int round, int row, int64_t row_bytes) {
  return stream.window != nullptr
             ? stream.window + staged_offset(c, Region::kNetIn, stream.at_peer, round, row, row_bytes)
             : c.team.windows[c.local_rank()] + staged_offset(c, Region::kNetOut, stream.idx, round, row, row_bytes);
}

// All lanes of a warp: its rows have been written to row_out() by this warp, or by those who have synchronised with it.
__device__ inline void put_chunk(const Context& c, const Chunk& chunk, int64_t row_bytes) {
  if constexpr (kHasNetwork) {
    const Stream stream = stream_of(c, chunk.stream);
    const int64_t bytes = chunk.rows(c) * row_bytes;
    const int64_t at = chunk_word_idx(c, stream.at_peer, chunk.round, chunk.idx);
    const uint64_t value = Tag::word(c.epoch, c.tag, c.sizes.num_rounds > 1 ? chunk.round_rows : 0);
    uint64_t* word = c.own_word(Region::kChunkFlag, at);
    __syncwarp();
    if (stream.window != nullptr) {
      auto* words = reinterpret_cast<uint64_t*>(stream.window + c.team.layout.offset(Region::kChunkFlag, c.lane));
      if (lane_idx() == 0) ptx::st_release_sys(words + at, value);
    } else if (bytes > 0) {
      put_signal_warp(row_in(c, stream.at_peer, chunk.round, chunk.first_row(c), row_bytes),
                      row_out(c, stream, chunk.round, chunk.first_row(c), row_bytes), bytes, word, value, stream.pe);
    } else if (lane_idx() == 0) {
      remote_signal(word, value, stream.pe);
    }
    if (lane_idx() == 0) atomicAdd(&c.team.control->network_bytes, static_cast<unsigned long long>(bytes));
    __syncwarp();
  }
}

// One thread. What it, and those it has synchronised with, have read of a round's chunk may be overwritten by the round
// after the next.
__device__ inline void give_chunk_credit(const Context& c, int stream_idx, int round, int idx) {
  if constexpr (kHasNetwork) {
    if (round + kStagedRounds >= c.sizes.num_rounds) return;
    const Stream stream = stream_of(c, stream_idx);
    remote_signal(c.own_word(Region::kChunkCredit, chunk_word_idx(c, stream.at_peer, round, idx)), c.epoch, stream.pe);
  }
}

}  // namespace deep_a2a::cuda
