// Dispatch across nodes, the source's part: rows are packed into streams and put to the rail peers (D4), count vectors
// are handed on (D2). docs/protocol.md has the steps, and the rounds.
#pragma once

#include "cuda/bases.cuh"
#include "cuda/cast.cuh"
#include "cuda/stages.cuh"

namespace deep_a2a::cuda {

__device__ inline StreamRow stream_row_of(const Context& c, const DispatchTask& t) {
  return StreamRow::dispatch(c.shape, t.args.format, t.cached);
}

// ---- tasks: chunks of a round ------------------------------------------------------------------------------------

// How the chunks of a round are handed out: some at a time where there are many, most of which have no rows.
struct ChunkTasks {
  int all;       // of a round
  int together;  // that a warp takes at a time

  __device__ explicit ChunkTasks(const Context& c) : all(num_streams(c) * chunks_per_round(c.shape)) {
    const int warps = num_warps() * static_cast<int>(gridDim.x);
    together = max(1, min(kWarpThreads, all / (4 * warps)));
  }
  __device__ int turns() const { return (all + together - 1) / together; }
};

// The next of a number of turns, which warps take as they come.
__device__ inline int take_turn(uint32_t& turns_taken) {
  uint32_t turn = 0;
  if (lane_idx() == 0) turn = atomicAdd(&turns_taken, 1u);
  return static_cast<int>(__shfl_sync(kFullWarp, turn, 0));
}

// Calls use(chunk) for the chunks of a turn that are put: those with rows, and with several rounds the first of each
// stream. `rows_of(stream, idx)` is asked by a lane for each chunk there can be; where it is negative the kernel has to
// be left, as where this is false.
template <class RowsOf, class Use>
__device__ bool for_chunks(const Context& c, const ChunkTasks& tasks, int round, int turn, RowsOf&& rows_of,
                           Use&& use) {
  const int task = turn * tasks.together + lane_idx();
  const bool exists = lane_idx() < tasks.together && task < tasks.all;
  const int stream = task % num_streams(c), idx = task / num_streams(c);
  const int rows = exists ? rows_of(stream, idx) : 0;
  if (__any_sync(kFullWarp, rows < 0)) return false;
  __syncwarp();  // what a lane has acquired is the warp's
  const bool put = exists && (idx * rows_per_chunk(c.shape) < rows || (idx == 0 && c.shape.num_rounds() > 1));
  for (uint32_t left = __ballot_sync(kFullWarp, put); left != 0; left &= left - 1) {
    const int lane = __ffs(static_cast<int>(left)) - 1;
    const Chunk chunk = Chunk::of(c, __shfl_sync(kFullWarp, stream, lane), round, __shfl_sync(kFullWarp, idx, lane),
                                  __shfl_sync(kFullWarp, rows, lane));
    if (!use(chunk)) return false;
  }
  return true;
}

// ---- D4, other nodes ---------------------------------------------------------------------------------------------

// The stream's rows before a round, as its source knows them.
__device__ inline int rows_before_round(const Context& c, const DispatchTask& t, int stream, int round) {
  if (round == 0) return 0;
  if (round * c.shape.tokens_per_round() < t.args.num_tokens) {
    return t.source.round_starts[stream * c.shape.num_rounds() + round];
  }
  if (t.cached) return t.source.stream_counts[stream];
  const CountVector own = c.counts_at(c.local_rank(), c.team.rank);
  return ptx::ld_relaxed_sys(own.node_rows + stream_of(c, stream).node);
}

// Makes rows of one stream, by a warp with a ring. Scales and route entries, with their places, go along by ordinary
// stores, for all rows before the first payload: a fence that a ring needed behind them would wait for them, row by
// row.
class Packer {
 public:
  __device__ Packer(const Context& c, const DispatchTask& t, const Stream& stream, const Chunk& chunk)
      : c_(c),
        t_(t),
        stages_(c, t.plan),
        layout_(stream_row_of(c, t)),
        first_expert_(stream.node * c.sizes.node_num_experts),
        num_rows_(chunk.end_row - chunk.first_row),
        tokens_(t.source.stream_tokens + int64_t{chunk.stream} * t.args.num_tokens +
                rows_before_round(c, t, chunk.stream, chunk.round) + chunk.first_row),
        out_(row_out(c, stream, chunk.round, chunk.first_row, layout_.bytes)) {}

  __device__ void run() const {
    if (!t_.cached) store_routes();
    if (t_.args.scales != nullptr && !casts()) store_scales();
    if (casts() && c_.shape.row_per_expert()) return cast_rows();
    move_items(
        stages_, casts() ? Refill::kBeforeWork : Refill::kAfterStore, 0, 1, num_rows_ * t_.plan.num_chunks,
        [&](int item, int stage) { load(item, stage); }, [&](int item, int stage) { store(item, stage); });
  }

 private:
  static constexpr int kTogether = 8;  // loads of a lane under way

  __device__ bool casts() const { return t_.args.cast != Cast::kNone; }
  __device__ int piece_bytes(int piece) const {
    const int row = casts() ? static_cast<int>(c_.shape.max_payload_bytes()) : t_.args.format.payload_bytes;
    return min(t_.plan.chunk_bytes, row - piece * t_.plan.chunk_bytes);
  }
  __device__ const char* row_of(int token) const {
    return static_cast<const char*>(t_.args.x) + token * t_.args.x_pitch;
  }

  // Calls load(i, row, idx) and then store(i, row, idx) for idx < `of_row` of each row, kTogether at a time in a lane.
  template <class Load, class Store>
  __device__ void for_rows(int of_row, Load&& load, Store&& store) const {
    const int all = num_rows_ * of_row;
    for (int first = lane_idx(); first < all; first += kTogether * kWarpThreads) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = first + i * kWarpThreads;
        if (at < all) load(i, at / of_row, at % of_row);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = first + i * kWarpThreads;
        if (at < all) store(i, at / of_row, at % of_row);
      }
    }
  }

  __device__ void store_routes() const {
    RouteEntry routes[kTogether];
    for_rows(
        c_.shape.num_topk, [&](int i, int row, int slot) { routes[i] = route_of(tokens_[row], slot); },
        [&](int i, int row, int slot) {
          reinterpret_cast<RouteEntry*>(out_ + row * layout_.bytes + layout_.routes_offset)[slot] = routes[i];
        });
  }

  __device__ RouteEntry route_of(int token, int slot) const {
    const int64_t entry = int64_t{token} * c_.shape.num_topk + slot;
    RouteEntry route;
    route.expert = t_.source.experts[entry];
    route.weight = t_.args.topk_weights != nullptr ? t_.args.topk_weights[entry] : 1.0f;
    route.rank_row = t_.source.slot_places[entry];
    route.expert_row = c_.shape.row_per_expert() ? t_.source.expert_places[entry] : -1;
    const auto on_node = static_cast<uint32_t>(route.expert - first_expert_);
    if (on_node < static_cast<uint32_t>(c_.sizes.node_num_experts)) return route;
    return {-1, route.weight, -1, -1};
  }

  // As they lie at the caller.
  __device__ void store_scales() const {
    const auto* scales = static_cast<const char*>(t_.args.scales);
    const auto alignment = reinterpret_cast<uintptr_t>(scales) | static_cast<uintptr_t>(t_.args.scales_pitch) |
                           static_cast<uintptr_t>(t_.args.format.scale_bytes);
    if (alignment % sizeof(uint4) == 0) return store_scale_pieces<uint4>(scales);
    if (alignment % sizeof(uint32_t) == 0) return store_scale_pieces<uint32_t>(scales);
    store_scale_pieces<uint8_t>(scales);
  }
  template <class Piece>
  __device__ void store_scale_pieces(const char* scales) const {
    Piece pieces[kTogether];
    for_rows(
        t_.args.format.scale_bytes / static_cast<int>(sizeof(Piece)),
        [&](int i, int row, int idx) {
          pieces[i] = reinterpret_cast<const Piece*>(scales + tokens_[row] * t_.args.scales_pitch)[idx];
        },
        [&](int i, int row, int idx) {
          reinterpret_cast<Piece*>(out_ + row * layout_.bytes + layout_.side_offset)[idx] = pieces[i];
        });
  }

  __device__ void load(int item, int stage) const {
    const int piece = item % t_.plan.num_chunks;
    if (casts()) ptx::fence_proxy_async_shared();  // it has read and written what the load overwrites
    __syncwarp();
    if (lane_idx() != 0) return;
    ptx::mbarrier_arrive_expect_tx(stages_.full + stage, piece_bytes(piece));
    ptx::bulk_load(stages_.payload(stage), row_of(tokens_[item / t_.plan.num_chunks]) + piece * t_.plan.chunk_bytes,
                   piece_bytes(piece), stages_.full + stage);
  }

  __device__ void store(int item, int stage) const {
    char* out = out_ + item / t_.plan.num_chunks * layout_.bytes;
    const int piece = item % t_.plan.num_chunks;
    int payload = piece_bytes(piece), payload_offset = piece * t_.plan.chunk_bytes;
    if (casts()) {
      const int group_bytes = t_.args.scale_format == ScaleFormat::kUE8M0 ? 1 : 4;
      char* scales = out + layout_.side_offset + payload_offset / 2 / kScaleGroupChannels * group_bytes;
      payload /= 2;
      payload_offset /= 2;
      cast_in_place(stages_.payload(stage), scales, payload, t_.args.cast, t_.args.scale_format);
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }
    if (lane_idx() == 0) ptx::bulk_store(out + payload_offset, stages_.payload(stage), payload);
  }

  // Where rows are pulled the rings are for rows that are FP8 already.
  __device__ void cast_rows() const {
    for (int row = 0; row < num_rows_; ++row) {
      char* out = out_ + row * layout_.bytes;
      cast_row(row_of(tokens_[row]), out, out + layout_.side_offset, c_.shape.hidden, t_.args.cast,
               t_.args.scale_format);
    }
  }

  const Context& c_;
  const DispatchTask& t_;
  const Stages stages_;
  const StreamRow layout_;
  const int first_expert_;  // of the node
  const int num_rows_;
  const int32_t* const tokens_;  // of the rows
  char* const out_;
};

__device__ inline int rows_of_round(const Context& c, const DispatchTask& t, int stream, int round) {
  return rows_before_round(c, t, stream, round + 1) - rows_before_round(c, t, stream, round);
}

// One lane: the last chunk that was put from the same place has been read. Every credit that is given is waited for, so
// that none is on its way when the next is given for the same word. False where the kernel has to be left.
__device__ inline bool d4_wait_room(const Context& c, const DispatchTask& t, int stream, int round, int idx) {
  const auto is_put = [&](int of_round) {
    return idx == 0 || idx * rows_per_chunk(c.shape) < rows_of_round(c, t, stream, of_round);
  };
  for (int before = round - kStagedRounds; before >= 0; before -= kStagedRounds) {
    if (is_put(before)) return wait_chunk_credit(c, stream, before, idx, Step::kD4SendNodes);
    if (!is_put(round)) return true;  // it takes no room
  }
  return true;
}

// A call of its own, for the sake of registers.
static __device__ __attribute__((noinline)) void d4_send_chunk(const Context& c, const DispatchTask& t,
                                                               const Chunk& chunk) {
  const Stream stream = stream_of(c, chunk.stream);
  if (chunk.round >= kStagedRounds) ptx::fence_proxy_async_global();  // room has been waited for by ordinary loads
  Packer(c, t, stream, chunk).run();
  put_chunk(c, chunk, stream_row_of(c, t).bytes);
}

__device__ inline bool d4_send_turn(const Context& c, const DispatchTask& t, const ChunkTasks& tasks, int round,
                                    int turn) {
  return for_chunks(
      c, tasks, round, turn,
      [&](int stream, int idx) {
        return d4_wait_room(c, t, stream, round, idx) ? rows_of_round(c, t, stream, round) : -1;
      },
      [&](const Chunk& chunk) {
        d4_send_chunk(c, t, chunk);
        return true;
      });
}

// The rounds that have room at once. The warps with rings share the work.
__device__ inline void d4_send_first_rounds(const Context& c, const DispatchTask& t) {
  if (warp_idx() >= t.plan.move_warps) return;
  const ChunkTasks tasks(c);
  const int turns = tasks.turns(), all = turns * min(kStagedRounds, c.shape.num_rounds());
  for (int turn = take_turn(c.control.grid.packed_chunks); turn < all; turn = take_turn(c.control.grid.packed_chunks)) {
    d4_send_turn(c, t, tasks, turn / turns, turn % turns);
  }
}

// ---- D2, as a relay ----------------------------------------------------------------------------------------------

// The vectors of the rail peers to the ranks of the node; a warp for each, the last of their blocks. False where the
// kernel has to be left.
__device__ inline bool d2_relay(const Context& c) {
  bool ok = true;
  const int last = (num_warps() - 1 - warp_idx()) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  for (int idx = last; idx < num_streams(c); idx += num_warps() * static_cast<int>(gridDim.x)) {
    const Stream stream = stream_of(c, idx);
    if (lane_idx() == 0) {
      uint64_t* word = c.own_word(Region::kNetCountsFlag, idx);
      ok = wait(c, word, c.epoch, Step::kD2Exchange, stream.peer);
      if (ok) acquire_put(word, c.epoch);
    }
    ok = __all_sync(kFullWarp, ok) != 0;
    __syncwarp();
    if (!ok) break;
    const char* from = c.own(Region::kNetCountsIn, c.lane) + idx * c.sizes.counts_bytes;
    for (int64_t offset = lane_idx() * 16; offset < c.sizes.counts_bytes; offset += kWarpThreads * 16) {
      const uint4 piece = *reinterpret_cast<const uint4*>(from + offset);
      for (int local = 0; local < c.num_locals(); ++local) {
        char* to = c.region(local, Region::kCounts, c.lane) + stream.peer * c.sizes.counts_bytes;
        *reinterpret_cast<uint4*>(to + offset) = piece;
      }
    }
    __syncwarp();
    if (lane_idx() < c.num_locals()) {
      signal(c.team, c.word(lane_idx(), Region::kCountsFlag, c.lane, stream.peer), c.epoch);
    }
  }
  return ok;
}

}  // namespace deep_a2a::cuda
