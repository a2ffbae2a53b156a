// C3: what a relay sums of its node's rows for the sources that have sent them by way of it.
#pragma once

#include "cuda/local_sum.cuh"
#include "cuda/side.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

// Of a round: one warp's share of the chunks. Who has written all rows of a chunk puts it.
class RelayedRows {
 public:
  struct Fetched {
    int chunk = 0;  // as chunk_at()
    int row = 0;    // of the round
    int end_row = 0;
    // By lane: of the top-k slot; -1 where its expert is on another node.
    int local = -1;
    int32_t rank_row = -1;
  };

  __device__ RelayedRows(const Context& c, const CombineTask& t, int round)
      : c_(c),
        t_(t),
        stream_row_(StreamRow::combine(c.shape, t.args.with_side)),
        round_(round),
        chunk_rows_(c.sizes.rows_per_chunk),
        taken_(grid_warp_idx() - all_warps()) {
    if (lane_idx() < c.num_locals()) peer_rows_ = c.region(lane_idx(), Region::kCombineRows, c.lane);
  }

  __device__ bool fetch(Fetched& fetched) {
    bool ends_empty = false;
    while (row_ >= end_row_ && !ends_empty) {
      if (!take_chunk()) return false;
      ends_empty = row_ >= end_row_ && row_ == 0 && c_.sizes.num_rounds > 1;  // of no row: for its credit
    }
    fetched = {taken_, row_, end_row_, -1, -1};
    if (ends_empty) return true;
    if (lane_idx() < c_.shape.num_topk) {
      const RouteEntry route = t_.relay.routes_of(c_.team, stream_idx(taken_), round_, row_)[lane_idx()];
      fetched.local = route.expert >= 0 ? c_.local_of_expert(route.expert) : -1;
      fetched.rank_row = route.rank_row;
    }
    ++row_;
    return true;
  }

  __device__ bool prepare(const Fetched& fetched, Sum& sum) {
    if (fetched.row % chunk_rows_ == 0 && !wait_room(stream_idx(fetched.chunk))) return false;
    if (fetched.row >= fetched.end_row) return true;
    const char* row = nullptr;  // a lane for each rank of the node
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int there = __shfl_sync(kFullWarp, fetched.local, slot);
      const int64_t rank_row = __shfl_sync(kFullWarp, fetched.rank_row, slot);
      if (there == lane_idx()) row = peer_rows_ + rank_row * c_.shape.max_payload_bytes();
    }
    from_others_ += __popc(__ballot_sync(kFullWarp, row != nullptr && lane_idx() != c_.local_rank()));
    sum = sum_of(row, out_of(fetched));
    return true;
  }

  __device__ void finish(const Fetched& fetched) const {
    if (t_.args.with_side && fetched.row < fetched.end_row && lane_idx() < c_.shape.num_topk) {
      auto* side = reinterpret_cast<float*>(out_of(fetched) + stream_row_.side_offset);
      side[lane_idx()] = fetched.local >= 0 ? side_of_row(c_, fetched.local, fetched.rank_row, lane_idx()) : 0.0f;
    }
    if (fetched.row == fetched.end_row - 1) put_chunk(c_, chunk_at(fetched.chunk), stream_row_.bytes);
  }

  // Once at the end: rows that came from other ranks of the node.
  __device__ void count_bytes() const {
    if (lane_idx() != 0 || from_others_ == 0) return;
    atomicAdd(&c_.team.control->wire_bytes, static_cast<unsigned long long>(from_others_ * row_wire_bytes(c_, t_)));
  }

 private:
  // Chunks of the streams by turns.
  __device__ int stream_idx(int chunk) const { return chunk % num_streams(c_); }
  __device__ Chunk chunk_at(int chunk) const {
    const int stream = stream_idx(chunk);
    const int round_rows = t_.relay.round_rows[stream * c_.sizes.num_rounds + round_];
    return {stream, round_, chunk / num_streams(c_), round_rows};
  }
  __device__ bool take_chunk() {
    taken_ += all_warps();
    if (taken_ >= num_streams(c_) * c_.sizes.chunks_per_round) return false;
    const Chunk chunk = chunk_at(taken_);
    row_ = chunk.first_row(c_);
    end_row_ = row_ + chunk.rows(c_);
    return true;
  }

  __device__ char* out_of(const Fetched& fetched) const {
    return row_out(c_, stream_of(c_, stream_idx(fetched.chunk)), round_, fetched.row, stream_row_.bytes);
  }

  // Before the first row of a chunk is written.
  __device__ bool wait_room(int stream) const {
    bool ok = true;
    if (lane_idx() == 0 && round_ >= kStagedRounds) {
      ok = wait_chunk_credit(c_, stream, round_ - kStagedRounds, 0, Step::kC3Relay);
    }
    __syncwarp();
    return __all_sync(kFullWarp, ok) != 0;
  }

  const Context& c_;
  const CombineTask& t_;
  const StreamRow stream_row_;
  const int round_;
  const int chunk_rows_;
  const char* peer_rows_ = nullptr;  // of the lane's rank
  int taken_;                        // the chunk that is being fetched
  int row_ = 0;                      // its next
  int end_row_ = 0;
  int64_t from_others_ = 0;
};

}  // namespace deep_a2a::cuda
