// The sums of combine across nodes, one step after another: own rows (C1b), what this rank has relayed (C3), and tokens
// (C2, C4). docs/protocol.md has the steps.
#pragma once

#include "cuda/side.cuh"
#include "cuda/sum.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

// One warp's part in one sum; returns where the ring has come to. A call, as registers do not suffice for the loops of
// all sums in one function.
template <Weighting kWeighting>
static __device__ __attribute__((noinline)) RingPosition sum_row(const SumRing& ring, RingPosition at, Term term,
                                                                 char* out, int row_bytes) {
  if (ring.loads) {
    load_row(ring, at, term, row_bytes);
  } else {
    add_row<kWeighting>(ring, at, term, out, row_bytes);
  }
  return at;
}

// One warp of a ring at its work. Both warps of a ring go through the same sums.
class NodeSums {
 public:
  __device__ NodeSums(const Context& c, const CombineTask& t)
      : c_(c),
        t_(t),
        ring_(c, t.plan),
        row_bytes_(static_cast<int>(c.shape.max_payload_bytes())),
        row_wire_bytes_(row_wire_bytes(c, t)),
        stream_row_(StreamRow::combine(c.shape, t.args.with_side)),
        chunk_rows_(rows_per_chunk(c.shape)),
        first_(ring_.idx * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
        step_(t.plan.num_rings * static_cast<int>(gridDim.x)) {
    if (lane_idx() < c.num_locals()) peer_rows_ = c.region(lane_idx(), Region::kCombineRows, c.lane);
  }

  // C1b, for the sources of all nodes.
  __device__ void own_rows() {
    if (!ring_.in_use() || !c_.shape.row_per_expert()) return;
    const int num_rows = ReceivedCounts::at(c_.shape, t_.kept.counts).num_received[1];
    const ReceivedRouting routing = ReceivedRouting::at(c_.shape, t_.kept.capacity, t_.kept.routing);
    char* out = c_.own(Region::kCombineRows, c_.lane);
    for (int row = first_; row < num_rows; row += step_) {
      Term term;  // a lane for each top-k slot
      if (lane_idx() < c_.shape.num_topk) {
        const int64_t entry = int64_t{row} * c_.shape.num_topk + lane_idx();
        const int64_t expert_row = routing.expert_rows[entry];
        if (expert_row >= 0) {
          term = {static_cast<const char*>(t_.args.rows) + expert_row * row_bytes_, routing.topk_weights[entry]};
        }
      }
      if (t_.args.weighted) {
        sum<Weighting::kByTerm>(term, out + int64_t{row} * row_bytes_);
      } else {
        sum<Weighting::kNone>(term, out + int64_t{row} * row_bytes_);
      }
    }
  }

  // C3 of a round. A chunk is one ring's, so that the warp that has written all of its rows puts it.
  __device__ void relay_rows(int round) {
    if (!ring_.in_use()) return;
    const int streams = num_streams(c_), rounds = c_.shape.num_rounds();
    int64_t from_others = 0;  // rows
    for (int i = first_; i < streams * chunks_per_round(c_.shape); i += step_) {
      const int stream = i % streams;
      const Chunk chunk = Chunk::of(c_, stream, round, i / streams, t_.relay.round_rows[stream * rounds + round]);
      if (chunk.first_row >= chunk.end_row && (rounds == 1 || chunk.idx > 0)) continue;
      if (!ring_.loads) wait_room(chunk);
      if (chunk.first_row >= chunk.end_row)
        continue;  // the source knows, and waits for no word that it needs no row of
      RouteEntry next = fetch_route(chunk, chunk.first_row);
      for (int row = chunk.first_row; row < chunk.end_row; ++row) {
        const RouteEntry route = next;
        next = fetch_route(chunk, min(row + 1, chunk.end_row - 1));  // on its way while the row is summed
        from_others += relay_row(chunk, row, route);
      }
      if (!ring_.loads && !__any_sync(kFullWarp, aborted_)) put_chunk(c_, chunk, stream_row_.bytes);
    }
    if (ring_.loads || lane_idx() != 0 || from_others == 0) return;
    atomicAdd(&c_.team.control->wire_bytes, static_cast<unsigned long long>(from_others * row_wire_bytes_));
  }

  // C2, C4 of a round, with the side payload.
  __device__ void tokens(int round) {
    if (!ring_.in_use()) return;
    const int round_tokens = c_.shape.tokens_per_round(), end = min((round + 1) * round_tokens, t_.num_tokens);
    round_ = round;
    // Tokens side by side are one ring's, since their partial rows lie in the same chunks.
    const int together = max(1, min(chunk_rows_, round_tokens / (2 * step_)));
    const auto following = [&](int token) {
      return (token + 1) % together != 0 ? token + 1 : token + 1 + (step_ - 1) * together;
    };
    const int begin = round * round_tokens;
    int32_t next = fetch_index(begin + first_ * together, lane_idx());
    for (int i = first_ * together; begin + i < end; i = following(i)) {
      const int token = begin + i;
      const int32_t index = next;
      next = fetch_index(begin + following(i), lane_idx());  // on its way while the token is summed
      const TokenTerms terms = token_terms(token, index);
      char* out = static_cast<char*>(t_.args.out) + int64_t{token} * row_bytes_;
      if (ring_.loads && t_.args.with_side) gather_side(token);
      if (!ring_.loads && terms.own.apart()) {
        add_row(ring_, at_, terms.count, out, row_bytes_,
                [&](char* to, int bytes) { add_node_chunks(ring_, at_, terms.count, terms.own, to, bytes); });
      } else {
        sum<Weighting::kNone>(terms.term, out);
      }
    }
    end_round(round);
  }

  __device__ bool aborted() const { return aborted_; }

 private:
  // By lane, in the order of nodes.
  struct TokenTerms {
    Term term;
    int count = 0;
    OwnTerms own;
  };

  template <Weighting kWeighting>
  __device__ void sum(const Term& term, char* out) {
    at_ = sum_row<kWeighting>(ring_, at_, term, out, row_bytes_);
  }

  // Before the first row of a chunk goes to net_out. As in Sums, the warps of a ring go on after a wait that failed.
  __device__ void wait_room(const Chunk& chunk) {
    bool ok = true;
    if (lane_idx() == 0 && chunk.round >= kStagedRounds) {
      ok = wait_chunk_credit(c_, chunk.stream, chunk.round - kStagedRounds, 0, Step::kC3Relay);
    }
    if (!__all_sync(kFullWarp, ok)) aborted_ = true;
    __syncwarp();
  }

  // The last warp to have summed its tokens of a round tells all relays that the round's rows have been read.
  __device__ void end_round(int round) const {
    if (round + kStagedRounds >= c_.shape.num_rounds()) return;
    if (!last_warp(c_.shared.rounds[round], 2 * t_.plan.num_rings, c_.control.grid.rounds[round])) return;
    for (int stream = lane_idx(); stream < num_streams(c_); stream += kWarpThreads) {
      give_chunk_credit(c_, stream, round, 0);
    }
    __syncwarp();
  }

  // Of the lane's top-k slot.
  __device__ RouteEntry fetch_route(const Chunk& chunk, int row) const {
    if (lane_idx() >= c_.shape.num_topk) return {-1, 0.0f, -1, -1};
    return t_.relay.routes_of(c_.shape, chunk.stream, chunk.round, row)[lane_idx()];
  }

  // Returns how many of the row's terms other ranks have.
  __device__ int relay_row(const Chunk& chunk, int row, const RouteEntry& route) {
    const int local = route.expert >= 0 ? c_.local_of_expert(route.expert) : -1;
    Term term;  // a lane for each rank of the node
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int there = __shfl_sync(kFullWarp, local, slot);
      const int64_t rank_row = __shfl_sync(kFullWarp, route.rank_row, slot);
      if (there == lane_idx()) term.row = peer_rows_ + rank_row * row_bytes_;
    }
    char* out = row_out(c_, stream_of(c_, chunk.stream), chunk.round, row, stream_row_.bytes);
    sum<Weighting::kNone>(term, out);
    if (!ring_.loads && t_.args.with_side && lane_idx() < c_.shape.num_topk) {
      auto* side = reinterpret_cast<float*>(out + stream_row_.side_offset);
      side[lane_idx()] = local >= 0 ? side_of_row(c_, local, route.rank_row, lane_idx()) : 0.0f;
    }
    return __popc(__ballot_sync(kFullWarp, term.row != nullptr && lane_idx() != c_.local_rank()));
  }

  // The row of its round that a token has in a stream, -1 for none.
  __device__ int row_of_round(int row, int stream) const {
    if (row < 0 || round_ == 0) return row;
    return row - t_.source.round_starts[stream * c_.shape.num_rounds() + round_];
  }

  __device__ bool is_own(int candidate) const {
    return candidate >= c_.own_node() && candidate < c_.own_node() + c_.num_locals();
  }
  __device__ int stream_of_candidate(int candidate) const {
    const int node = candidate < c_.own_node() ? candidate : candidate - c_.num_locals() + 1;
    return c_.shape.topology.stream_idx(c_.own_node(), node);
  }

  // What a token has with a candidate: its place there, or its row in the stream; -1 for nothing.
  __device__ int32_t fetch_index(int token, int candidate) const {
    if (token >= t_.num_tokens || candidate >= num_streams(c_) + c_.num_locals()) return -1;
    if (is_own(candidate)) {
      return t_.source.rank_places[int64_t{token} * c_.num_locals() + candidate - c_.own_node()];
    }
    return t_.source.stream_rows[int64_t{token} * num_streams(c_) + stream_of_candidate(candidate)];
  }

  // The candidates are: a row for each node before the own one, for each rank of the own node, for each node behind it.
  // The lanes look at as many at a time; those that the token has go to the first lanes. The warp that loads waits for
  // the chunks they lie in.
  // `index` is the lane's of the first candidates.
  __device__ TokenTerms token_terms(int token, int32_t index) {
    TokenTerms terms;
    bool waited = false;
    const int candidates = num_streams(c_) + c_.num_locals();
    for (int first = 0; first < candidates; first += kWarpThreads) {
      const int candidate = first + lane_idx();
      const bool own = is_own(candidate);
      if (first > 0) index = fetch_index(token, candidate);
      const char* row = nullptr;
      if (own && index >= 0) {
        const int local = candidate - c_.own_node();
        row =
            c_.region(local, Region::kCombineRows, c_.lane) + int64_t{t_.source.rank_bases[local] + index} * row_bytes_;
      } else if (index >= 0) {
        const int stream = stream_of_candidate(candidate), there = row_of_round(index, stream);
        row = row_in(c_, stream, round_, there, stream_row_.bytes);
        if (ring_.loads) waited |= wait_partial(stream, there / chunk_rows_, first == 0);
      }
      const uint32_t present = __ballot_sync(kFullWarp, row != nullptr);
      const uint32_t before = __ballot_sync(kFullWarp, row != nullptr && candidate < c_.own_node());
      terms.own.begin += __popc(before);
      terms.own.end += __popc(before) + __popc(__ballot_sync(kFullWarp, row != nullptr && own));
      for (uint32_t left = present; left != 0; left &= left - 1, ++terms.count) {
        const auto moved = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(row), __ffs(static_cast<int>(left)) - 1);
        if (lane_idx() == terms.count) terms.term.row = reinterpret_cast<const char*>(moved);
      }
    }
    __syncwarp();
    if (__any_sync(kFullWarp, waited)) ptx::fence_proxy_async_global();  // acquired by an ordinary load, as peers' rows
    return terms;
  }

  // C4. One lane. A lane has the same stream for all tokens where a warp has one for each candidate: `remembers` then.
  // True where it has looked at a word. As in Sums, loads go on after a wait that failed.
  __device__ bool wait_partial(int stream, int chunk, bool remembers) {
    const int of_all = round_ * chunks_per_round(c_.shape) + chunk;
    if (aborted_ || (remembers && of_all <= seen_)) return false;
    int round_rows = 0;
    aborted_ = !wait_chunk(c_, stream, round_, chunk, Step::kC4AddNodes, round_rows);
    if (remembers) seen_ = of_all;
    return true;
  }

  // Each slot's value from the rank that has its expert, by way of the relay for other nodes; +0 without one. After
  // token_terms() by the same warp.
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
    const int stream = c_.shape.topology.stream_idx(c_.own_node(), expert / c_.sizes.node_num_experts);
    const int32_t row = t_.source.stream_rows[int64_t{token} * num_streams(c_) + stream];
    const char* side =
        row_in(c_, stream, round_, row_of_round(row, stream), stream_row_.bytes) + stream_row_.side_offset;
    return ptx::ld_relaxed_sys(reinterpret_cast<const float*>(side) + lane_idx());
  }

  const Context& c_;
  const CombineTask& t_;
  const SumRing ring_;
  const int row_bytes_;
  const int64_t row_wire_bytes_;
  const StreamRow stream_row_;
  const int chunk_rows_;
  const int first_;  // of the ring's share
  const int step_;
  const char* peer_rows_ = nullptr;  // of the lane's rank
  int round_ = 0;                    // that tokens() is at
  int seen_ = -1;                    // the last chunk of the lane's stream that has arrived
  bool aborted_ = false;
  RingPosition at_;
};

}  // namespace deep_a2a::cuda
