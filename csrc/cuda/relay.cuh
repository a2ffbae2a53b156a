// D5: a relay takes what its rail peers have put, adds the bases, and stores the rows to their final rows on its node.
#pragma once

#include "cuda/nodes.cuh"

namespace deep_a2a::cuda {

// What a rail peer's dispatch has put to this rank, though all ranks refuse it, is waited for, by one thread for each
// stream; nobody uses it.
__device__ inline bool drain_streams(const Context& c) {
  const int idx = stream_of_thread(c);
  if (idx < 0) return true;
  const Stream stream = stream_of(c, idx);
  const int rounds = c.shape.num_rounds();
  int rows = ptx::ld_relaxed_sys(counts_of(c, stream.peer).node_rows + c.own_node());
  bool ok = true;
  for (int round = 0; round < min(rounds, kStagedRounds); ++round) {
    for (int chunk = 0; ok && (chunk * rows_per_chunk(c.shape) < rows || (rounds > 1 && chunk == 0)); ++chunk) {
      const uint64_t* word = c.own_word(Region::kChunkFlag, chunk_word_idx(c, idx, round, chunk));
      ok = wait_epoch(c, word, Step::kD5Relay, stream.peer);
      if (ok && rounds > 1) rows = Tag::rows_of(ptx::ld_relaxed_sys(word));
    }
  }
  return ok;
}

// One warp of a relay at work, with a ring.
class Relay {
 public:
  __device__ Relay(const Context& c, const DispatchTask& t, const BasesArena& bases)
      : c_(c),
        t_(t),
        bases_(bases),
        stages_(c, t.plan),
        layout_(stream_row_of(c, t)),
        format_(t.args.format),
        cached_(t.cached),
        num_pieces_(ceil_div(t.args.format.payload_bytes, t.plan.chunk_bytes)) {
    if (lane_idx() >= c.num_locals()) return;
    rows_ = c.region(lane_idx(), Region::kRecvRows, t.args.slot);
    scales_ = c.region(lane_idx(), Region::kRecvScales, t.args.slot);
    records_ = c.region(lane_idx(), Region::kRecvRoutes, t.args.slot);
  }

  // How many rows a round of a stream has; negative where the kernel has to be left. One lane.
  __device__ int round_rows(int stream, int round) const {
    const int rounds = c_.shape.num_rounds();
    int32_t& kept = t_.relay.round_rows[stream * rounds + round];
    if (t_.cached) return kept;
    if (rounds == 1) return ptx::ld_relaxed_sys(counts_of(c_, stream_of(c_, stream).peer).node_rows + c_.own_node());
    int rows = 0;
    if (!wait_chunk(c_, stream, round, 0, Step::kD5Relay, rows)) return -1;
    kept = rows;  // all who write it write the same
    return rows;
  }

  // False where the kernel has to be left.
  __device__ bool chunk(const Chunk& chunk) {
    bool ok = true;
    int round_rows = 0;
    if (lane_idx() == 0) ok = wait_chunk(c_, chunk.stream, chunk.round, chunk.idx, Step::kD5Relay, round_rows);
    if (!__all_sync(kFullWarp, ok)) return false;
    __syncwarp();
    ptx::fence_proxy_async_global();  // acquired by an ordinary load, read by bulk loads
    for (int row = chunk.first_row; row < chunk.end_row; row += rows_together()) store_side(chunk, row);
    __syncwarp();
    next_ = final_route(chunk, chunk.first_row, lane_idx());
    move_items(
        stages_, Refill::kAfterStore, 0, 1, (chunk.end_row - chunk.first_row) * num_pieces_,
        [&](int item, int stage) {
          load(chunk, item, stage);
          next_ = final_route(chunk, chunk.first_row + (item + 1) / num_pieces_, lane_idx());
        },
        [&](int item, int stage) { store(item, stage); });
    if (lane_idx() == 0) give_chunk_credit(c_, chunk.stream, chunk.round, chunk.idx);
    return true;
  }

  // Once at the end: what went to other ranks of the node.
  __device__ void count_bytes() const {
    if (lane_idx() != 0 || to_others_ == 0) return;
    atomicAdd(&c_.team.control->wire_bytes, static_cast<unsigned long long>(to_others_));
  }

 private:
  __device__ static char* of_lane(char* pointer, int lane) {
    return reinterpret_cast<char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(pointer), lane));
  }

  __device__ int piece_bytes(int piece) const {
    return min(t_.plan.chunk_bytes, format_.payload_bytes - piece * t_.plan.chunk_bytes);
  }

  // ---- what goes along with payloads: for all rows of a chunk before the first of these, as in Packer

  // That the lanes hold at once, a lane for each slot.
  static constexpr int kMostTogether = 4;
  __device__ int rows_together() const { return min(kWarpThreads / c_.shape.num_topk, kMostTogether); }

  // From the handle, where it has been kept; lanes behind the top-k slots have none.
  __device__ RouteEntry final_route(const Chunk& chunk, int row, int slot) const {
    if (row >= chunk.end_row || slot >= c_.shape.num_topk) return {-1, 0.0f, -1, -1};
    return t_.relay.routes_of(c_.shape, chunk.stream, chunk.round, row)[slot];
  }

  // As it came, made final, and kept.
  __device__ RouteEntry make_final(const Chunk& chunk, int row, int slot) const {
    if (row >= chunk.end_row) return {-1, 0.0f, -1, -1};
    const char* from = row_in(c_, chunk.stream, chunk.round, row, layout_.bytes) + layout_.routes_offset;
    RouteEntry route = reinterpret_cast<const RouteEntry*>(from)[slot];
    if (route.expert >= 0) {
      const int node_expert = route.expert - c_.sizes.node_first_expert;
      route.rank_row += bases_.relay_rank_bases[chunk.stream * c_.num_locals() + c_.local_of_expert(route.expert)];
      if (c_.shape.row_per_expert()) {
        route.expert_row += bases_.relay_expert_bases[chunk.stream * c_.sizes.node_num_experts + node_expert];
      }
    }
    t_.relay.routes_of(c_.shape, chunk.stream, chunk.round, row)[slot] = route;
    return route;
  }

  // Loads are issued for all rows before one is waited for.
  __device__ void store_side(const Chunk& chunk, int first) {
    const int topk = c_.shape.num_topk, row = first + lane_idx() / topk, slot = lane_idx() % topk;
    uint4 scales[kMostTogether];  // the first 512 bytes, which is mostly all of them
#pragma unroll
    for (int i = 0; i < kMostTogether; ++i) {
      scales[i] = make_uint4(0, 0, 0, 0);
      if (lane_idx() * 16 < format_.scale_span() && first + i < chunk.end_row) {
        scales[i] = *reinterpret_cast<const uint4*>(side_of(chunk, first + i) + lane_idx() * 16);
      }
    }
    RouteEntry mine{-1, 0.0f, -1, -1};
    if (lane_idx() < rows_together() * topk) {
      mine = cached_ ? final_route(chunk, row, slot) : make_final(chunk, row, slot);
    }
#pragma unroll
    for (int i = 0; i < kMostTogether; ++i) {
      if (i >= rows_together() || first + i >= chunk.end_row) break;
      const int from = min(i * topk + lane_idx(), kWarpThreads - 1);
      RouteEntry route{__shfl_sync(kFullWarp, mine.expert, from), __shfl_sync(kFullWarp, mine.weight, from),
                       __shfl_sync(kFullWarp, mine.rank_row, from), __shfl_sync(kFullWarp, mine.expert_row, from)};
      if (lane_idx() >= topk) route = {-1, 0.0f, -1, -1};
      const Target target = target_of(route);
      if (format_.scale_span() > 0) store_scales(side_of(chunk, first + i), scales[i], target);
      if (!cached_) store_records(route, target.rank_row, __ballot_sync(kFullWarp, target.rank_row >= 0));
    }
  }

  __device__ const char* side_of(const Chunk& chunk, int row) const {
    return row_in(c_, chunk.stream, chunk.round, row, layout_.bytes) + layout_.side_offset;
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
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int32_t there = __shfl_sync(kFullWarp, route.rank_row, slot);
      if (__shfl_sync(kFullWarp, local, slot) == lane_idx()) rank_row = there;
    }
    if (c_.shape.row_per_expert()) return {local, route.expert_row, rank_row};
    return {rank_row >= 0 ? lane_idx() : -1, rank_row, rank_row};
  }

  __device__ void store_scales(const char* from, uint4 value, const Target& target) {
    char* to = of_lane(scales_, max(target.local, 0)) + int64_t{target.row} * format_.scale_pitch();
    const uint32_t targets = __ballot_sync(kFullWarp, target.local >= 0);
    const int span = format_.scale_span();
    for (int offset = lane_idx() * 16; offset - lane_idx() * 16 < span; offset += kWarpThreads * 16) {
      if (offset >= kWarpThreads * 16 && offset < span) value = *reinterpret_cast<const uint4*>(from + offset);
      for (uint32_t left = targets; left != 0; left &= left - 1) {
        char* there = of_lane(to, __ffs(static_cast<int>(left)) - 1);
        if (offset < span) *reinterpret_cast<uint4*>(there + offset) = value;
      }
    }
    to_others_ += int64_t{others(target)} * span;
  }
  __device__ int others(const Target& target) const {
    return __popc(__ballot_sync(kFullWarp, target.local >= 0 && target.local != c_.local_rank()));
  }

  // ---- payloads, through the ring

  __device__ void load(const Chunk& chunk, int item, int stage) const {
    const int piece = item % num_pieces_;
    const char* from = row_in(c_, chunk.stream, chunk.round, chunk.first_row + item / num_pieces_, layout_.bytes);
    __syncwarp();
    if (lane_idx() < c_.shape.num_topk) reinterpret_cast<RouteEntry*>(stages_.record(stage))[lane_idx()] = next_;
    if (lane_idx() == 0) {
      ptx::mbarrier_arrive_expect_tx(stages_.full + stage, piece_bytes(piece));
      ptx::bulk_load(stages_.payload(stage), from + piece * t_.plan.chunk_bytes, piece_bytes(piece),
                     stages_.full + stage);
    }
    __syncwarp();
  }

  __device__ void store(int item, int stage) {
    const int piece = item % num_pieces_;
    RouteEntry route{-1, 0.0f, -1, -1};
    if (lane_idx() < c_.shape.num_topk) route = reinterpret_cast<const RouteEntry*>(stages_.record(stage))[lane_idx()];
    const Target target = target_of(route);
    char* to = of_lane(rows_, max(target.local, 0)) + int64_t{target.row} * format_.payload_bytes;
    if (target.local >= 0) {
      ptx::bulk_store(to + piece * t_.plan.chunk_bytes, stages_.payload(stage), piece_bytes(piece));
    }
    to_others_ += int64_t{others(target)} * piece_bytes(piece);
  }

  __device__ void store_records(const RouteEntry& route, int32_t rank_row, uint32_t ranks) {
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
      const int local = __ffs(static_cast<int>(left)) - 1;
      const int64_t there = __shfl_sync(kFullWarp, rank_row, local);
      char* records = of_lane(records_, local);
      const RouteRecord record = RouteRecord::at(c_.shape, records + there * c_.sizes.record_bytes);
      if (record.from_row != nullptr && lane_idx() == 0) *record.from_row = -1;  // it is not pulled
      if (lane_idx() >= c_.shape.num_topk) continue;
      record.experts[lane_idx()] = route.expert;
      record.weights[lane_idx()] = route.weight;
      if (record.expert_rows != nullptr) record.expert_rows[lane_idx()] = route.expert < 0 ? -1 : route.expert_row;
    }
    to_others_ += __popc(ranks & ~(1u << c_.local_rank())) * c_.sizes.record_bytes;
  }

  const Context& c_;
  const DispatchTask& t_;
  const BasesArena bases_;
  const Stages stages_;
  const StreamRow layout_;
  const RowFormat format_;
  const bool cached_;
  const int num_pieces_;  // of a row, each in a stage
  RouteEntry next_;       // of the lane's slot, of the row that is loaded next
  // Of the lane's rank: where its rows of `x`, their scales, and the records start.
  char* rows_ = nullptr;
  char* scales_ = nullptr;
  char* records_ = nullptr;
  int64_t to_others_ = 0;  // bytes
};

// The bases that a relay needs, in a launch that has not worked them out itself: the counts still lie in the window.
__device__ inline void d3_relay_bases(const Context& c, const BasesArena& arena) {
  sum_counts(c, arena);
  __syncthreads();
  if (c.shape.row_per_expert()) start_groups(c, arena);
  ptx::fence_proxy_async();  // the arena has been written by ordinary stores, later it is by bulk loads
  __syncthreads();
}

// D5 of each round, and between them D4 of the rounds for which it makes room. Warps come when they have nothing else
// to do. False where the kernel has to be left.
static __device__ __attribute__((noinline)) bool d5_relay(const Context& c, const DispatchTask& t) {
  if (warp_idx() >= t.plan.move_warps) return true;
  Relay relay(c, t, BasesArena(c, t.plan));
  const ChunkTasks tasks(c);
  const int turns = tasks.turns(), rounds = c.shape.num_rounds();
  // While rounds are left to be sent, every round has as many turns for D4 as for D5.
  const int both = 2 * turns * max(rounds - kStagedRounds, 0), all = both + turns * min(rounds, kStagedRounds);
  for (int turn = take_turn(c.control.grid.moved_chunks); turn < all; turn = take_turn(c.control.grid.moved_chunks)) {
    const int kind = turn / turns;  // rounds, those with both twice
    const bool in_both = turn < both;
    const int round = in_both ? kind / 2 : kind - both / turns / 2;
    bool ok = true;
    if (in_both && kind % 2 == 1) {
      ok = d4_send_turn(c, t, tasks, round + kStagedRounds, turn % turns);
    } else {
      ok = for_chunks(
          c, tasks, round, turn % turns, [&](int stream, int) { return relay.round_rows(stream, round); },
          [&](const Chunk& chunk) { return relay.chunk(chunk); });
    }
    if (!ok) return false;
  }
  relay.count_bytes();
  return true;
}

}  // namespace deep_a2a::cuda
