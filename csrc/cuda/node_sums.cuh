// The sums of combine across nodes, one step after another: own rows (C1b), what this rank has relayed (C3, in
// relayed_rows.cuh), and tokens (C2, C4), the last two by rounds. docs/protocol.md has the steps.
#pragma once

#include "cuda/local_sum.cuh"
#include "cuda/relayed_rows.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

// C1b: one warp's share of the rank rows, for the sources of all nodes.
class OwnRows {
 public:
  struct Fetched {
    int row = 0;
    int32_t expert_row = -1;  // by lane: of the top-k slot
    float weight = 1.0f;
  };

  __device__ OwnRows(const Context& c, const CombineTask& t)
      : c_(c),
        t_(t),
        routing_(ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing)),
        num_rows_(ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]),
        row_(grid_warp_idx()) {}

  __device__ bool fetch(Fetched& fetched) {
    if (row_ >= num_rows_) return false;
    fetched = {row_, -1, 1.0f};
    if (lane_idx() < c_.shape.num_topk) {
      const int64_t entry = int64_t{row_} * c_.shape.num_topk + lane_idx();
      fetched.expert_row = routing_.expert_rows[entry];
      if (t_.args.weighted) fetched.weight = routing_.topk_weights[entry];
    }
    row_ += all_warps();
    return true;
  }

  __device__ bool prepare(const Fetched& fetched, Sum& sum) const {
    const int64_t row_bytes = c_.shape.max_payload_bytes();
    const char* row = static_cast<const char*>(t_.args.rows) + fetched.expert_row * row_bytes;
    sum = weighted_sum_of(fetched.expert_row >= 0 ? row : nullptr, fetched.weight,
                          c_.own(Region::kCombineRows, c_.lane) + fetched.row * row_bytes);
    return true;
  }

  __device__ void finish(const Fetched&) const {}

 private:
  const Context& c_;
  const CombineTask& t_;
  const ReceivedRouting routing_;
  const int num_rows_;
  int row_;
};

// C2, C4 of a round, with the side payload: one warp's share of the tokens.
class Tokens {
 public:
  struct Fetched {
    int token = 0;
    int32_t index = -1;  // by lane: of the first candidates
  };

  __device__ Tokens(const Context& c, const CombineTask& t, int round)
      : c_(c),
        t_(t),
        row_bytes_(c.shape.max_payload_bytes()),
        stream_row_(StreamRow::combine(c.shape, t.args.with_side)),
        chunk_rows_(c.sizes.rows_per_chunk),
        round_(round),
        begin_(round * c.shape.tokens_per_round()),
        end_(min(begin_ + c.shape.tokens_per_round(), t.num_tokens)),
        together_(max(1, min(chunk_rows_, c.shape.tokens_per_round() / (2 * all_warps())))),
        next_(grid_warp_idx() * together_) {}

  __device__ bool fetch(Fetched& fetched) {
    const int token = begin_ + next_;
    if (token >= end_) return false;
    fetched = {token, fetch_index(token, lane_idx())};
    // Tokens side by side are one warp's, since their partial rows lie in the same chunks.
    if (++next_ % together_ == 0) next_ += (all_warps() - 1) * together_;
    return true;
  }

  // The candidates are: a row for each node before the own one, for each rank of the own node, for each node behind it.
  // The lanes look at as many at a time; those that the token has go to the first lanes.
  __device__ bool prepare(const Fetched& fetched, Sum& sum) {
    sum.out = static_cast<char*>(t_.args.out) + fetched.token * row_bytes_;
    bool ok = true;
    const int candidates = num_streams(c_) + c_.num_locals();
    for (int first = 0; first < candidates; first += kWarpThreads) {
      const int candidate = first + lane_idx();
      const int32_t index = first > 0 ? fetch_index(fetched.token, candidate) : fetched.index;
      const bool own = is_own(candidate);
      const char* row = nullptr;
      if (own && index >= 0) {
        const int local = candidate - c_.own_node();
        row =
            c_.region(local, Region::kCombineRows, c_.lane) + int64_t{t_.source.rank_bases[local] + index} * row_bytes_;
      } else if (index >= 0) {
        const int stream = stream_of_candidate(candidate), there = row_of_round(index, stream);
        row = row_in(c_, stream, round_, there, stream_row_.bytes);
        ok = ok && wait_partial(stream, there / chunk_rows_, first == 0);
      }
      const uint32_t present = __ballot_sync(kFullWarp, row != nullptr);
      const uint32_t before = __ballot_sync(kFullWarp, row != nullptr && candidate < c_.own_node());
      sum.apart_begin += __popc(before);
      sum.apart_end += __popc(before) + __popc(__ballot_sync(kFullWarp, row != nullptr && own));
      for (uint32_t left = present; left != 0; left &= left - 1, ++sum.count) {
        const char* moved = shuffled(row, __ffs(static_cast<int>(left)) - 1);
        if (lane_idx() == sum.count) sum.row = moved;
      }
    }
    __syncwarp();
    return __all_sync(kFullWarp, ok) != 0;
  }

  __device__ void finish(const Fetched& fetched) const {
    if (t_.args.with_side) gather_side(fetched.token);
  }

  // The last warp to have summed its tokens of a round tells all relays that the round's rows have been read.
  __device__ void c4_give_credit() const {
    if (round_ + kStagedRounds >= c_.sizes.num_rounds) return;
    if (!last_warp(c_.shared.rounds[round_], num_warps(), c_.control.grid.rounds[round_])) return;
    for (int stream = lane_idx(); stream < num_streams(c_); stream += kWarpThreads) {
      give_chunk_credit(c_, stream, round_, 0);
    }
    __syncwarp();
  }

 private:
  // The row of its round that a token has in a stream, -1 for none.
  __device__ int row_of_round(int row, int stream) const {
    if (row < 0 || round_ == 0) return row;
    return row - t_.source.round_starts[stream * c_.sizes.num_rounds + round_];
  }

  __device__ bool is_own(int candidate) const {
    return candidate >= c_.own_node() && candidate < c_.own_node() + c_.num_locals();
  }
  __device__ int stream_of_candidate(int candidate) const {
    const int node = candidate < c_.own_node() ? candidate : candidate - c_.num_locals() + 1;
    return stream_to(c_, node);
  }

  // What a token has with a candidate: its place there, or its row in the stream; -1 for nothing.
  __device__ int32_t fetch_index(int token, int candidate) const {
    if (token >= t_.num_tokens || candidate >= num_streams(c_) + c_.num_locals()) return -1;
    if (is_own(candidate)) {
      return t_.source.rank_places[int64_t{token} * c_.num_locals() + candidate - c_.own_node()];
    }
    return t_.source.stream_rows[int64_t{token} * num_streams(c_) + stream_of_candidate(candidate)];
  }

  // C4. One lane. A lane has the same stream for all tokens where a warp has one for each candidate: `remembers` then.
  // False where the kernel has to be left.
  __device__ bool wait_partial(int stream, int chunk, bool remembers) {
    if (remembers && chunk <= seen_) return true;
    if (remembers) seen_ = chunk;
    int round_rows = 0;
    return wait_chunk(c_, stream, round_, chunk, Step::kC4AddNodes, round_rows);
  }

  // Each slot's value from the rank that has its expert, by way of the relay for other nodes; +0 without one. After
  // prepare() by the same warp.
  __device__ void gather_side(int token) const {
    if (lane_idx() >= c_.shape.num_topk) return;
    const int64_t entry = int64_t{token} * c_.shape.num_topk + lane_idx();
    const int expert = t_.source.experts[entry];
    float value = 0.0f;
    if (expert >= 0) {
      const int local = c_.local_of_expert(expert);
      value = local >= 0 ? side_of_token(c_, t_, token, local, lane_idx()) : side_of_partial(token, expert);
    }
    t_.args.side_out[entry] = value;
  }

  __device__ float side_of_partial(int token, int expert) const {
    const int stream = stream_to(c_, expert / c_.sizes.node_num_experts);
    const int32_t row = t_.source.stream_rows[int64_t{token} * num_streams(c_) + stream];
    const char* side =
        row_in(c_, stream, round_, row_of_round(row, stream), stream_row_.bytes) + stream_row_.side_offset;
    return ptx::ld_relaxed_sys(reinterpret_cast<const float*>(side) + lane_idx());
  }

  const Context& c_;
  const CombineTask& t_;
  const int64_t row_bytes_;
  const StreamRow stream_row_;
  const int chunk_rows_;
  const int round_;
  const int begin_;
  const int end_;
  const int together_;
  int next_;       // among the round's
  int seen_ = -1;  // the last chunk of the lane's stream that has arrived
};

}  // namespace deep_a2a::cuda
