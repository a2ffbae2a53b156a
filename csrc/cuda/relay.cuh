// D5: a relay takes what its rail peers have put, adds the bases, and stores the rows to their final rows on its node.
#pragma once

#include "cuda/nodes.cuh"
#include "cuda/routing.cuh"

namespace deep_a2a::cuda {

// One warp of a relay at work, with a ring. A piece of a row comes into a stage together with the row's scales, if it
// is the last; route entries are loaded by the lanes, a row ahead.
class Relay {
 public:
  __device__ Relay(const Context& c, const DispatchTask& t, const BasesArena& bases)
      : c_(c),
        t_(t),
        bases_(bases),
        stages_(c, t.plan),
        layout_(stream_row_of(c, t)),
        last_piece_(ceil_div(t.args.format.payload_bytes, t.plan.chunk_bytes) - 1),
        window_(c.team.windows[min(lane_idx(), c.num_locals() - 1)]) {}

  // How many rows a round of a stream has; negative where the kernel has to be left. Lanes ask, each for itself.
  __device__ int round_rows(int stream, int round) const {
    const int rounds = c_.sizes.num_rounds;
    int32_t& kept = t_.relay.round_rows[stream * rounds + round];
    if (t_.cached) return kept;
    if (rounds == 1) return rows_for_node(c_, stream_of(c_, stream).peer);
    int rows = 0;
    if (!wait_chunk(c_, stream, round, 0, Step::kD5Relay, rows)) return -1;
    kept = rows;  // all who write it write the same
    return rows;
  }

  // The chunks that next(chunk) gives, until it gives none. False where the kernel has to be left.
  template <class Next>
  __device__ bool run(Next&& next) {
    move_items(
        stages_,
        [&](int stage, bool waits) {
          while (rows_left_ == 0) {
            if (!has_come(next, waits)) return false;
            enter();
          }
          load(stage);
          return true;
        },
        [&](int stage) { store(stage); });
    return ok_;
  }

  // Once at the end: what went to other ranks of the node.
  __device__ void count_bytes() const {
    if (lane_idx() != 0 || to_others_ == 0) return;
    atomicAdd(&c_.team.control->wire_bytes, static_cast<unsigned long long>(to_others_));
  }

 private:
  struct Item {
    Chunk chunk;
    int piece;
    bool ends_chunk;
  };

  __device__ static char* of_lane(char* pointer, int lane) {
    return reinterpret_cast<char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(pointer), lane));
  }

  __device__ int piece_bytes(int piece) const {
    return min(t_.plan.chunk_bytes, t_.args.format.payload_bytes - piece * t_.plan.chunk_bytes);
  }
  __device__ int scale_bytes(int piece) const { return piece == last_piece_ ? t_.args.format.scale_span() : 0; }

  // Whether there is a next chunk, and it has arrived. With items under way nobody waits for it: they come first.
  template <class Next>
  __device__ bool has_come(Next&& next, bool waits) {
    if (!ok_) return false;
    if (!is_coming_) is_coming_ = next(chunk_);
    if (!is_coming_) return false;
    bool here = true;
    if (lane_idx() == 0) {
      int round_rows = 0;
      here = (waits || chunk_is_here(c_, chunk_.stream, chunk_.round, chunk_.idx)) &&
             wait_chunk(c_, chunk_.stream, chunk_.round, chunk_.idx, Step::kD5Relay, round_rows);
      if (here) ptx::fence_proxy_async_global();  // acquired by an ordinary load, read by bulk loads
    }
    here = __all_sync(kFullWarp, here) != 0;
    __syncwarp();
    is_coming_ = !here;
    ok_ = here || !waits;
    return here;
  }

  // The chunk that is loaded from here on.
  __device__ void enter() {
    rows_left_ = chunk_.rows(c_);
    if (rows_left_ == 0) return give_credit(chunk_);
    const int row = chunk_.first_row(c_);
    from_ = row_in(c_, chunk_.stream, chunk_.round, row, layout_.bytes);
    kept_ = t_.relay.routes_of(c_.team, chunk_.stream, chunk_.round, row);
    fetch_route();
  }
  __device__ void give_credit(const Chunk& chunk) const {
    if (lane_idx() == 0) give_chunk_credit(c_, chunk.stream, chunk.round, chunk.idx);
  }

  // Of the lane's slot: as it came, or from the handle.
  __device__ void fetch_route() {
    const auto* came = reinterpret_cast<const RouteEntry*>(from_ + layout_.routes_offset);
    if (lane_idx() < c_.shape.num_topk) next_ = (t_.cached ? kept_ : came)[lane_idx()];
  }

  // The fetched one made final, and kept.
  __device__ RouteEntry final_route() const {
    RouteEntry route = next_;
    if (t_.cached || lane_idx() >= c_.shape.num_topk) return route;
    if (route.expert >= 0) {
      const int node_expert = route.expert - c_.sizes.node_first_expert;
      route.rank_row += bases_.relay_rank_bases[chunk_.stream * c_.num_locals() + c_.local_of_expert(route.expert)];
      if (c_.per_expert) {
        route.expert_row += bases_.relay_expert_bases[chunk_.stream * c_.sizes.node_num_experts + node_expert];
      }
    }
    if (piece_ == 0) kept_[lane_idx()] = route;
    return route;
  }

  // In a stage scales lie behind the last piece, as they do in the stream.
  __device__ void load(int stage) {
    const bool is_last = piece_ == last_piece_;
    const RouteEntry route = final_route();
    if (lane_idx() < c_.shape.num_topk) reinterpret_cast<RouteEntry*>(stages_.routes(stage))[lane_idx()] = route;
    if (lane_idx() == 0) {
      stages_.item<Item>(stage) = {chunk_, piece_, is_last && rows_left_ == 1};
      const int bytes = piece_bytes(piece_) + scale_bytes(piece_);
      ptx::mbarrier_arrive_expect_tx(stages_.full + stage, bytes);
      ptx::bulk_load(stages_.payload(stage), from_ + piece_ * t_.plan.chunk_bytes, bytes, stages_.full + stage);
    }
    __syncwarp();
    if (!is_last) {
      ++piece_;
      return;
    }
    piece_ = 0;
    from_ += layout_.bytes;
    kept_ += c_.shape.num_topk;
    if (--rows_left_ > 0) fetch_route();
  }

  __device__ void store(int stage) {
    const Item item = stages_.item<Item>(stage);
    const int bytes = piece_bytes(item.piece), scales = scale_bytes(item.piece);
    RouteEntry route{-1, 0.0f, -1, -1};
    if (lane_idx() < c_.shape.num_topk) route = reinterpret_cast<const RouteEntry*>(stages_.routes(stage))[lane_idx()];
    const Target target = target_of(route);
    char* window = of_lane(window_, max(target.local, 0));
    if (target.local >= 0) {
      const int64_t rows = c_.team.layout.offset(Region::kRecvRows, t_.args.slot) + item.piece * t_.plan.chunk_bytes;
      ptx::bulk_store(window + rows + int64_t{target.row} * t_.args.format.payload_bytes, stages_.payload(stage),
                      bytes);
      if (scales > 0) {
        const int64_t first = c_.team.layout.offset(Region::kRecvScales, t_.args.slot);
        ptx::bulk_store(window + first + int64_t{target.row} * t_.args.format.scale_pitch(),
                        stages_.payload(stage) + bytes, scales);
      }
    }
    const uint32_t others = __ballot_sync(kFullWarp, target.local >= 0 && target.local != c_.local_rank());
    to_others_ += int64_t{__popc(others)} * (bytes + scales);
    if (item.piece == 0 && !has_kept_routing(c_, t_)) store_records(route, target.rank_row, item.chunk.stream);
    if (item.ends_chunk) give_credit(item.chunk);  // all loads of it are complete
  }

  // By lane: where a row of `x` goes to, a rank of the node (-1: nowhere) and the row there; and the rank row at the
  // lane's rank, if it has one.
  struct Target {
    int local;
    int32_t row;
    int32_t rank_row;
  };

  __device__ Target target_of(const RouteEntry& route) const {
    const int local = route.expert >= 0 ? c_.local_of_expert(route.expert) : -1;
    int32_t rank_row = -1;
#pragma unroll 4
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int32_t there = __shfl_sync(kFullWarp, route.rank_row, slot);
      if (__shfl_sync(kFullWarp, local, slot) == lane_idx()) rank_row = there;
    }
    if (c_.per_expert) return {local, route.expert_row, rank_row};
    return {rank_row >= 0 ? lane_idx() : -1, rank_row, rank_row};
  }

  // As the source would have: where rows are per expert, with places.
  __device__ void store_records(const RouteEntry& route, int32_t rank_row, int stream) {
    const uint32_t ranks = __ballot_sync(kFullWarp, rank_row >= 0);
    const int source = stream_of(c_, stream).peer;
    int32_t rank_base = 0, expert_base = 0;
    if (c_.per_expert && rank_row >= 0) rank_base = bases_.relay_rank_bases[stream * c_.num_locals() + lane_idx()];
    if (c_.per_expert && route.expert >= 0) {
      const int node_expert = route.expert - c_.sizes.node_first_expert;
      expert_base = bases_.relay_expert_bases[stream * c_.sizes.node_num_experts + node_expert];
    }
#pragma unroll 1
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
      const int local = __ffs(static_cast<int>(left)) - 1;
      const int32_t there = __shfl_sync(kFullWarp, rank_row - rank_base, local);
      const RouteRecord record = RouteRecord::at(
          c_.shape, c_.per_expert ? c_.record_of_source(local, source, there) : c_.record(local, there));
      if (record.from_row != nullptr && lane_idx() == 0) *record.from_row = -1;  // it is not pulled
      if (lane_idx() >= c_.shape.num_topk) continue;
      record.experts[lane_idx()] = route.expert;
      record.weights[lane_idx()] = route.weight;
      if (record.expert_rows != nullptr) record.expert_rows[lane_idx()] = route.expert_row - expert_base;
    }
    to_others_ += __popc(ranks & ~(1u << c_.local_rank())) * c_.sizes.record_bytes;
  }

  const Context& c_;
  const DispatchTask& t_;
  const BasesArena bases_;
  const Stages stages_;
  const StreamRow layout_;
  const int last_piece_;  // of a row
  char* const window_;    // of the lane's rank
  // What is loaded: the chunk, which may still be awaited, and the piece of its row.
  Chunk chunk_{};
  bool is_coming_ = false;
  bool ok_ = true;
  int rows_left_ = 0;
  int piece_ = 0;
  const char* from_ = nullptr;
  RouteEntry* kept_ = nullptr;
  RouteEntry next_{-1, 0.0f, -1, -1};  // of the lane's slot
  int64_t to_others_ = 0;              // bytes
};

}  // namespace deep_a2a::cuda
