// D1, what a warp does with its tokens: it counts them, and gives their rows places. Where rows are per expert it then
// sends their route records (D4), since peers pull by them. It is done once, by all SMs: short code, since most of its
// time it would wait for its own instructions.
#pragma once

#include "cuda/sync.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

constexpr int32_t kNoBadEntry = INT32_MAX;

// What D1 and D2 have in the arena. A row of counters has ranks, experts, streams, as BlockCounts.
struct CountArena {
  int columns;
  int32_t* vector;  // this rank's count vector
  int32_t* rows;    // [warps, columns]: of each warp that counts
  int32_t* sums;    // [columns]: over the warps, then of the blocks before this one
  char* images;     // of this warp: of 32 tokens the experts, or where rows are per expert the route records

  __device__ CountArena(const Context& c, const DispatchPlan& plan)
      : columns(c.num_ranks() + c.shape.num_experts + num_streams(c)),
        vector(reinterpret_cast<int32_t*>(c.arena + plan.ring_offset)),
        rows(vector + c.sizes.counts_bytes / 4),
        sums(rows + plan.count_warps * columns),
        images(c.arena + plan.ring_offset + c.sizes.counts_bytes +
               align_up((plan.count_warps + 1) * columns * 4, kRowAlignment) +
               warp_idx() * kWarpThreads * plan.image_bytes) {}
  __device__ int32_t* of_warp() const { return rows + warp_idx() * columns; }
};

struct Range {
  int begin;
  int end;
};

// The tokens that this warp counts: consecutive ones, in the order of blocks, then of warps.
__device__ inline Range tokens_of_warp(int num_tokens, const DispatchPlan& plan) {
  const bool alone = plan.counting == Counting::kAlone;
  const int parts = (alone ? 1 : static_cast<int>(gridDim.x)) * plan.count_warps;
  const int part = (alone ? 0 : static_cast<int>(blockIdx.x)) * plan.count_warps + warp_idx();
  const int tokens = ceil_div(num_tokens, parts);
  return {min(num_tokens, part * tokens), min(num_tokens, (part + 1) * tokens)};
}

__device__ inline int64_t read_expert(const DispatchArgs& args, int64_t entry) {
  return args.topk_idx_bytes == 8 ? static_cast<const int64_t*>(args.topk_idx)[entry]
                                  : static_cast<const int32_t*>(args.topk_idx)[entry];
}

enum class Pass : int { kCount, kPlace };

// One warp's walk over its tokens, 32 at a time: to count them, and again, when the counters hold what came before the
// warp, for the places of their rows.
template <Pass kPass>
class TokenWalk {
 public:
  __device__ TokenWalk(const Context& c, const DispatchTask& t, const CountArena& arena)
      : c_(c),
        t_(t),
        columns_(arena.of_warp()),
        images_(arena.images),
        pieces_(static_cast<int>(c.sizes.record_bytes) / kRowAlignment),
        together_(kWarpThreads / pieces_),
        token_of_lane_(lane_idx() / pieces_) {}

  __device__ void run() const {
    if (warp_idx() >= t_.plan.count_warps) return;
    const Range tokens = tokens_of_warp(t_.args.num_tokens, t_.plan);
#pragma unroll 1
    for (int first = tokens.begin; first < tokens.end; first += kWarpThreads) {
      const int count = min(kWarpThreads, tokens.end - first);
      read_batch(first, count, tokens.end - tokens.begin <= kWarpThreads);
      if (kPlaces && c_.per_expert) complete_images(first, count);
#pragma unroll 1
      for (int node = 0; node < c_.sizes.num_nodes; ++node) ranks_of_node(first + lane_idx(), lane_idx() < count, node);
      __syncwarp();
    }
  }

 private:
  static constexpr bool kPlaces = kPass == Pass::kPlace;
  static constexpr int kTogether = 8;     // entries of a lane, to wait for them together
  static constexpr int kOutOfRange = -2;  // beside experts and -1

  // Of a token of the batch: its experts, and behind them, in the second pass, the rest of its record.
  __device__ int32_t* image(int token) const {
    return reinterpret_cast<int32_t*>(images_ + token * t_.plan.image_bytes);
  }
  // The word of a top-k slot of the batch, in the record's array number `array`.
  __device__ int32_t& word_of(int entry, int array = 0) const {
    const int token = static_cast<int>(static_cast<uint32_t>(entry) * c_.sizes.topk_reciprocal >> 16);
    return image(token)[entry - token * c_.shape.num_topk + array * c_.shape.num_topk];
  }

  // What a warp has counted in one go is still there when it comes back for the places.
  __device__ void read_batch(int first, int count, bool is_all) const {
    if (kPlaces && is_all) return;
    const int begin = first * c_.shape.num_topk, entries = count * c_.shape.num_topk;
#pragma unroll 1
    for (int base = lane_idx(); base < entries; base += kTogether * kWarpThreads) {
      int experts[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) experts[i] = read(begin + min(base + i * kWarpThreads, entries - 1));
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (base + i * kWarpThreads >= entries) continue;
        word_of(base + i * kWarpThreads) = experts[i];
        if (!kPlaces) count_entry(begin + base + i * kWarpThreads, experts[i]);
      }
    }
    __syncwarp();
  }

  // The expert of an entry, -1 for none.
  __device__ int read(int entry) const {
    if (kPlaces) return t_.source.experts[entry];
    const int64_t expert = read_expert(t_.args, entry);
    return expert >= -1 && expert < c_.shape.num_experts ? static_cast<int>(expert) : kOutOfRange;
  }

  // One that is out of range is noted, and counts as none, as a negative one does.
  __device__ void count_entry(int entry, int expert) const {
    t_.source.experts[entry] = max(expert, -1);
    if (expert >= 0) atomicAdd(columns_ + c_.num_ranks() + expert, 1);
    if (expert == kOutOfRange) atomicMin(&c_.shared.bad_entry, entry);
  }

  // The ranks of a node that the lane's token goes to, as bits.
  __device__ uint32_t wanted_ranks(int node) const {
    const int first = node * c_.sizes.node_num_experts;
    uint32_t wanted = 0;
#pragma unroll 4
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const auto on_node = static_cast<uint32_t>(image(lane_idx())[slot] - first);
      if (on_node < static_cast<uint32_t>(c_.sizes.node_num_experts)) {
        wanted |= 1u << c_.local_of(static_cast<int>(on_node));
      }
    }
    return wanted;
  }

  // Rows to each rank of a node, and to the node.
  __device__ void ranks_of_node(int token, bool exists, int node) const {
    const int locals = c_.num_locals();
    const uint32_t wanted = exists ? wanted_ranks(node) : 0;
    int32_t* rank_rows = columns_ + node * locals;
    int32_t count = lane_idx() < locals ? rank_rows[lane_idx()] : 0;  // of the lane's rank
#pragma unroll 1
    for (int local = 0; local < locals; ++local) {
      const bool here = (wanted >> local & 1) != 0;
      const uint32_t lanes = __ballot_sync(kFullWarp, here);
      if (kPlaces) {
        const int32_t place = __shfl_sync(kFullWarp, count, local) + __popc(lanes & lanes_below());
        if (exists) keep_place(token, node, local, here ? place : -1);
        if (c_.per_expert && (!kHasNetwork || node == c_.own_node())) d4_send_batch(local, here ? place : -1);
      }
      if (lane_idx() == local) count += __popc(lanes);
    }
    if (lane_idx() < locals) rank_rows[lane_idx()] = count;
    if (!kHasNetwork || node == c_.own_node()) return;
    const int stream = stream_to(c_, node);
    int32_t& stream_rows = columns_[c_.num_ranks() + c_.shape.num_experts + stream];
    const uint32_t lanes = __ballot_sync(kFullWarp, wanted != 0);
    const int32_t before = stream_rows;
    __syncwarp();
    if (lane_idx() == 0) stream_rows = before + __popc(lanes);
    if (kPlaces && exists) keep_stream_row(token, stream, before + __popc(lanes & lanes_below()), wanted != 0);
  }

  __device__ void keep_place(int token, int node, int local, int32_t place) const {
    if (!kHasNetwork || node == c_.own_node()) {
      t_.source.rank_places[int64_t{token} * c_.num_locals() + local] = place;
    } else if (place >= 0) {
      keep_slot_places(token, node, local, place);
    }
  }

  // Of the slots of a token whose experts are at this rank of another node: the place there, for its route entries.
  __device__ void keep_slot_places(int token, int node, int local, int32_t place) const {
    const int first = node * c_.sizes.node_num_experts + local * c_.sizes.num_local_experts;
#pragma unroll 1
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int at = image(lane_idx())[slot] - first;
      if (static_cast<uint32_t>(at) < static_cast<uint32_t>(c_.sizes.num_local_experts)) {
        t_.source.slot_places[int64_t{token} * c_.shape.num_topk + slot] = place;
      }
    }
  }

  __device__ void keep_stream_row(int token, int stream, int32_t row, bool wanted) const {
    t_.source.stream_rows[int64_t{token} * num_streams(c_) + stream] = wanted ? row : -1;
    if (wanted) t_.source.stream_tokens[int64_t{stream} * t_.args.num_tokens + row] = token;
    const int rounds = c_.sizes.num_rounds, round = rounds > 1 ? token / c_.shape.round_tokens : 0;
    if (token == round * c_.shape.round_tokens) t_.source.round_starts[stream * rounds + round] = row;
  }

  // Of all tokens of the batch, for all their ranks alike.
  __device__ void complete_images(int first, int count) const {
    const int begin = first * c_.shape.num_topk, entries = count * c_.shape.num_topk;
#pragma unroll 1
    for (int base = lane_idx(); base < entries; base += kTogether * kWarpThreads) {
      float weights[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int entry = begin + min(base + i * kWarpThreads, entries - 1);
        weights[i] = t_.args.topk_weights != nullptr ? t_.args.topk_weights[entry] : 1.0f;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (base + i * kWarpThreads < entries) word_of(base + i * kWarpThreads, 1) = __float_as_int(weights[i]);
      }
    }
    if (lane_idx() < count) image(lane_idx())[3 * c_.shape.num_topk] = first + lane_idx();  // where the row is found
    expert_places(first, count);
    __syncwarp();
  }

  __device__ void expert_places(int first, int count) const {
    int32_t* rows = columns_ + c_.num_ranks();
    const int entries = count * c_.shape.num_topk;
#pragma unroll 1
    for (int begin = 0; begin < entries; begin += kWarpThreads) {
      const int i = begin + lane_idx(), expert = i < entries ? word_of(i) : -1;
      const uint32_t same = __match_any_sync(kFullWarp, expert);
      const int32_t place = expert >= 0 ? rows[expert] + __popc(same & lanes_below()) : 0;
      __syncwarp();
      if (expert >= 0 && (same & lanes_below()) == 0) rows[expert] += __popc(same);
      __syncwarp();
      if (i >= entries) continue;
      t_.source.expert_places[first * c_.shape.num_topk + i] = place;
      word_of(i, 2) = place;
    }
  }

  // D4: the records of the batch, each by as many lanes as it has pieces, to a rank of the node where the lane's token
  // has that `place`, or -1. Where every block knows all places each sends some of them.
  __device__ void d4_send_batch(int local, int32_t place) const {
    const auto turn = static_cast<unsigned>(warp_idx() * c_.num_locals() + local);
    if (t_.plan.counting == Counting::kAlone && turn % gridDim.x != blockIdx.x) return;
    const int offset = (lane_idx() - token_of_lane_ * pieces_) * kRowAlignment;
    char* to = c_.record_of_source(local, c_.team.rank, 0) + offset;
#pragma unroll 1
    for (int first = 0; first < kWarpThreads; first += together_) {
      const int token = first + token_of_lane_;
      const int64_t there = __shfl_sync(kFullWarp, place, min(token, kWarpThreads - 1));
      if (token_of_lane_ >= together_ || token >= kWarpThreads || there < 0) continue;
      *reinterpret_cast<uint4*>(to + there * c_.sizes.record_bytes) =
          *reinterpret_cast<const uint4*>(images_ + token * t_.plan.image_bytes + offset);
    }
  }

  const Context& c_;
  const DispatchTask& t_;
  int32_t* const columns_;
  char* const images_;
  const int pieces_;    // of 16 bytes, of a record
  const int together_;  // records that a warp sends at a time
  const int token_of_lane_;
};

}  // namespace deep_a2a::cuda
