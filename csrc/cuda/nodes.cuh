// Dispatch across nodes, the source's part: rows are packed into streams and put to the rail peers (D4), count vectors
// are handed on (D2). docs/protocol.md has the steps, and the rounds.
#pragma once

#include "cuda/bases.cuh"
#include "cuda/cast.cuh"
#include "cuda/stages.cuh"

namespace deep_a2a::cuda {

// kPieces pieces of 16 bytes of a lane, one warp's width apart. All loads are issued, then those of `meanwhile`, before
// one is waited for.
template <int kPieces, class Meanwhile>
__device__ inline void move_pieces(const char* from, int offset, uint32_t targets, char* to, Meanwhile&& meanwhile) {
  constexpr int kStride = kWarpThreads * 16;
  uint4 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) pieces[i] = ptx::ld_once(from + offset + i * kStride);
  meanwhile();
  for (uint32_t left = targets; left != 0; left &= left - 1) {
    const int target = __ffs(static_cast<int>(left)) - 1;
    char* there = reinterpret_cast<char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(to), target)) + offset;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) *reinterpret_cast<uint4*>(there + i * kStride) = pieces[i];
  }
}

// A row by a warp, loaded once, and stored for each lane in `targets` to that lane's `to`. `meanwhile` starts other
// loads before the first are waited for.
template <class Meanwhile>
__device__ inline void move_row(const char* from, int bytes, uint32_t targets, char* to, Meanwhile&& meanwhile) {
  constexpr int kTogether = 14, kStride = kWarpThreads * 16;  // a row of 7168 channels in FP8 at once
  int first = 0;
  if (kTogether * kStride <= bytes) {
    move_pieces<kTogether>(from, lane_idx() * 16, targets, to, meanwhile);
    first = kTogether * kStride;
  } else {
    meanwhile();
  }
#pragma unroll 1
  for (; first + kTogether * kStride <= bytes; first += kTogether * kStride) {
    move_pieces<kTogether>(from, first + lane_idx() * 16, targets, to, [] {});
  }
#pragma unroll 1
  for (; first < bytes; first += kStride) {
    const int offset = first + lane_idx() * 16;
    const uint4 piece = offset < bytes ? ptx::ld_once(from + offset) : make_uint4(0, 0, 0, 0);
    for (uint32_t left = targets; left != 0; left &= left - 1) {
      const int target = __ffs(static_cast<int>(left)) - 1;
      char* there = reinterpret_cast<char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(to), target));
      if (offset < bytes) *reinterpret_cast<uint4*>(there + offset) = piece;
    }
  }
}

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

// A row's scales, as they lie at the caller: some words a lane where they fit registers.
struct ScaleWords {
  static constexpr int kWords = 2;  // 8192 channels
  uint32_t words[kWords];

  __device__ static bool fit(const DispatchTask& t) {
    const auto all = reinterpret_cast<uintptr_t>(t.args.scales) | static_cast<uintptr_t>(t.args.scales_pitch) |
                     static_cast<uintptr_t>(t.args.format.scale_bytes);
    return all % 4 == 0 && t.args.format.scale_bytes <= kWords * kWarpThreads * 4;
  }
  __device__ void load(const char* from, int bytes) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int at = (i * kWarpThreads + lane_idx()) * 4;
      if (at < bytes) words[i] = *reinterpret_cast<const uint32_t*>(from + at);
    }
  }
  __device__ void store(char* to, int bytes) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int at = (i * kWarpThreads + lane_idx()) * 4;
      if (at < bytes) *reinterpret_cast<uint32_t*>(to + at) = words[i];
    }
  }
};

// Makes rows of one stream: payload, scales, and the route entries with their places. What does not change from row to
// row is kept: behind every store the compiler takes it that anything in memory may have changed.
class Packer {
 public:
  __device__ Packer(const Context& c, const DispatchTask& t, int node)
      : layout_(stream_row_of(c, t)),
        cast_(t.args.cast),
        scale_format_(t.args.scale_format),
        scales_fit_(ScaleWords::fit(t)),
        rows_(static_cast<const char*>(t.args.x)),
        scales_(static_cast<const char*>(t.args.scales)),
        pitch_(t.args.x_pitch),
        scales_pitch_(t.args.scales_pitch),
        payload_bytes_(t.args.format.payload_bytes),
        scale_bytes_(t.args.scales != nullptr && t.args.cast == Cast::kNone ? t.args.format.scale_bytes : 0),
        hidden_(c.shape.hidden),
        topk_(t.cached ? 0 : c.shape.num_topk),
        first_expert_(node * c.sizes.node_num_experts),
        node_experts_(c.sizes.node_num_experts),
        experts_(t.source.experts),
        weights_(t.args.topk_weights),
        rank_places_(t.source.slot_places),
        expert_places_(c.shape.row_per_expert() ? t.source.expert_places : nullptr) {}

  __device__ int64_t row_bytes() const { return layout_.bytes; }

  // What a lane has to know of a token: as a top-k slot its expert, weight and places.
  __device__ RouteEntry fetch_route(int token) const {
    RouteEntry route{-1, 0.0f, -1, -1};
    if (lane_idx() >= topk_) return route;
    const int64_t entry = int64_t{token} * topk_ + lane_idx();
    route.expert = experts_[entry];
    route.weight = weights_ != nullptr ? weights_[entry] : 1.0f;
    route.rank_row = rank_places_[entry];  // of no meaning for experts of other nodes
    if (expert_places_ != nullptr) route.expert_row = expert_places_[entry];
    return route;
  }

  // `meanwhile` as for move_row().
  template <class Meanwhile>
  __device__ void row(int token, RouteEntry route, char* to, Meanwhile&& meanwhile) const {
    const char* from = rows_ + token * pitch_;
    if (cast_ != Cast::kNone) {
      meanwhile();
      cast_row(from, to, to + layout_.side_offset, hidden_, cast_, scale_format_);
    } else {
      const char* scales = scales_ + token * scales_pitch_;
      ScaleWords words{};
      move_row(from, payload_bytes_, 1, to, [&] {
        if (scales_fit_) words.load(scales, scale_bytes_);
        meanwhile();
      });
      if (scales_fit_) {
        words.store(to + layout_.side_offset, scale_bytes_);
      } else {
        copy_bytes(to + layout_.side_offset, scales, scale_bytes_);
      }
    }
    if (lane_idx() >= topk_) return;
    if (static_cast<uint32_t>(route.expert - first_expert_) >= static_cast<uint32_t>(node_experts_)) {
      route = {-1, route.weight, -1, -1};
    }
    reinterpret_cast<RouteEntry*>(to + layout_.routes_offset)[lane_idx()] = route;
  }

 private:
  const StreamRow layout_;
  const Cast cast_;
  const ScaleFormat scale_format_;
  const bool scales_fit_;
  const char* const rows_;
  const char* const scales_;
  const int64_t pitch_;
  const int64_t scales_pitch_;
  const int payload_bytes_;
  const int scale_bytes_;
  const int hidden_;
  const int topk_;  // entries of a row's route
  const int first_expert_;
  const int node_experts_;
  const int32_t* const experts_;
  const float* const weights_;
  const int32_t* const rank_places_;
  const int32_t* const expert_places_;
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
  const Packer packer(c, t, stream.node);
  const int64_t row_bytes = packer.row_bytes();
  char* out = row_out(c, stream, chunk.round, chunk.first_row, row_bytes);
  const int32_t* tokens = t.source.stream_tokens + int64_t{chunk.stream} * t.args.num_tokens +
                          rows_before_round(c, t, chunk.stream, chunk.round);
  for (int first = chunk.first_row; first < chunk.end_row; first += kWarpThreads) {
    const int rows = min(kWarpThreads, chunk.end_row - first);
    const int own = lane_idx() < rows ? tokens[first + lane_idx()] : 0;  // of the lane's row
    RouteEntry next = packer.fetch_route(__shfl_sync(kFullWarp, own, 0));
    for (int i = 0; i < rows; ++i, out += row_bytes) {
      const RouteEntry route = next;
      const int token = __shfl_sync(kFullWarp, own, i), following = __shfl_sync(kFullWarp, own, min(i + 1, rows - 1));
      packer.row(token, route, out, [&] { next = packer.fetch_route(following); });
    }
  }
  put_chunk(c, chunk, row_bytes);
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

// The rounds that have room at once. All warps that call it share the work.
__device__ inline void d4_send_first_rounds(const Context& c, const DispatchTask& t) {
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
    char* to = lane_idx() < c.num_locals() ? c.region(lane_idx(), Region::kCounts, c.lane) : nullptr;
    move_row(from, c.sizes.counts_bytes, __ballot_sync(kFullWarp, to != nullptr),
             to + stream.peer * c.sizes.counts_bytes, [] {});
    __syncwarp();
    if (lane_idx() < c.num_locals()) {
      signal(c.team, c.word(lane_idx(), Region::kCountsFlag, c.lane, stream.peer), c.epoch);
    }
  }
  return ok;
}

}  // namespace deep_a2a::cuda
