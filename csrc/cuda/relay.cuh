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

// One warp of a relay at work.
class Relay {
 public:
  __device__ Relay(const Context& c, const DispatchTask& t, const BasesArena& bases)
      : c_(c), t_(t), bases_(bases), layout_(stream_row_of(c, t)), format_(t.args.format), cached_(t.cached) {
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
    RouteEntry next = fetch_route(chunk, chunk.first_row);
    for (int row = chunk.first_row; row < chunk.end_row; ++row) {
      const RouteEntry route = next;
      this->row(chunk, row, route, [&] { next = fetch_route(chunk, min(row + 1, chunk.end_row - 1)); });
    }
    __syncwarp();
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

  // `meanwhile` as for move_row().
  template <class Meanwhile>
  __device__ void row(const Chunk& chunk, int row, const RouteEntry& fetched, Meanwhile&& meanwhile) {
    const char* from = row_in(c_, chunk.stream, chunk.round, row, layout_.bytes);
    const RouteEntry route = final_route(chunk, row, fetched);
    // A lane for each rank of the node: the rank row there.
    int32_t rank_row = -1;
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int32_t expert = __shfl_sync(kFullWarp, route.expert, slot);
      const int32_t there = __shfl_sync(kFullWarp, route.rank_row, slot);
      if (expert >= 0 && c_.local_of_expert(expert) == lane_idx()) rank_row = there;
    }
    const uint32_t ranks = __ballot_sync(kFullWarp, rank_row >= 0);
    if (c_.shape.row_per_expert()) {  // a lane for each top-k slot
      const int local = route.expert >= 0 ? c_.local_of_expert(route.expert) : -1;
      store_row(from, local, route.expert_row, meanwhile);
    } else {
      store_row(from, rank_row >= 0 ? lane_idx() : -1, rank_row, meanwhile);
    }
    if (!cached_) store_records(route, rank_row, ranks);
  }

  // Of the lane's slot: as it came, or final from the handle.
  __device__ RouteEntry fetch_route(const Chunk& chunk, int row) const {
    if (lane_idx() >= c_.shape.num_topk) return {-1, 0.0f, -1, -1};
    if (t_.cached) return t_.relay.routes_of(c_.shape, chunk.stream, chunk.round, row)[lane_idx()];
    const char* from = row_in(c_, chunk.stream, chunk.round, row, layout_.bytes);
    return reinterpret_cast<const RouteEntry*>(from + layout_.routes_offset)[lane_idx()];
  }

  // With final rows, which the handle keeps.
  __device__ RouteEntry final_route(const Chunk& chunk, int row, RouteEntry route) const {
    if (t_.cached || lane_idx() >= c_.shape.num_topk) return route;
    if (route.expert >= 0) {
      const int node_expert = route.expert - c_.sizes.node_first_expert;
      route.rank_row += bases_.relay_rank_bases[chunk.stream * c_.num_locals() + c_.local_of_expert(route.expert)];
      if (c_.shape.row_per_expert()) {
        route.expert_row += bases_.relay_expert_bases[chunk.stream * c_.sizes.node_num_experts + node_expert];
      }
    }
    t_.relay.routes_of(c_.shape, chunk.stream, chunk.round, row)[lane_idx()] = route;
    return route;
  }

  // To the lane's row of `x` at a rank of the node; lanes with rank -1 have none.
  template <class Meanwhile>
  __device__ void store_row(const char* from, int local, int64_t row, Meanwhile&& meanwhile) {
    const uint32_t targets = __ballot_sync(kFullWarp, local >= 0);
    char* rows = of_lane(rows_, max(local, 0)) + row * format_.payload_bytes;
    char* scales = of_lane(scales_, max(local, 0)) + row * format_.scale_pitch();
    // The first 512 bytes of scales, which is mostly all of them, are on their way while the payload is waited for.
    const int span = format_.scale_span(), early_bytes = min(span, 16 * kWarpThreads);
    uint4 early = make_uint4(0, 0, 0, 0);
    move_row(from, format_.payload_bytes, targets, rows, [&] {
      if (lane_idx() * 16 < span) early = reinterpret_cast<const uint4*>(from + layout_.side_offset)[lane_idx()];
      meanwhile();
    });
    for (uint32_t left = span > 0 ? targets : 0; left != 0; left &= left - 1) {
      const int target = __ffs(static_cast<int>(left)) - 1;
      auto* there = reinterpret_cast<uint4*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(scales), target));
      if (lane_idx() * 16 < span) there[lane_idx()] = early;
    }
    if (span > early_bytes) {
      move_row(from + layout_.side_offset + early_bytes, span - early_bytes, targets, scales + early_bytes, [] {});
    }
    const int others = __popc(__ballot_sync(kFullWarp, local >= 0 && local != c_.local_rank()));
    to_others_ += int64_t{others} * (format_.payload_bytes + format_.scale_span());
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
  // Kept, as in Packer; of the lane's rank, where its rows of `x`, their scales, and the records start.
  const StreamRow layout_;
  const RowFormat format_;
  const bool cached_;
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
