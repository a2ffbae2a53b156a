// D4, other nodes: the rows of a stream, made in shared memory and put chunk by chunk.
#pragma once

#include "cuda/cast.cuh"
#include "cuda/count_words.cuh"
#include "cuda/stages.cuh"

namespace deep_a2a::cuda {

__device__ inline StreamRow stream_row_of(const Context& c, const DispatchTask& t) {
  return StreamRow::dispatch(c.shape, t.args.format, t.cached);
}

// The stream's rows before a round, as its source knows them.
__device__ inline int rows_before_round(const Context& c, const DispatchTask& t, int stream, int round) {
  if (round == 0) return 0;
  if (round * c.shape.tokens_per_round() < t.args.num_tokens) {
    return t.source.round_starts[stream * c.sizes.num_rounds + round];
  }
  if (t.cached) return t.source.stream_counts[stream];
  return read_count(c, c.team.rank, node_rows_idx(stream_of(c, stream).node));
}

// Makes the rows of streams and puts them, by a warp with a ring, which stays full from one chunk to the next. In its
// stage a row is what it is on its way: scales and route entries, with their places, lie behind the last piece of the
// payload, and leave with it.
class Packer {
 public:
  __device__ Packer(const Context& c, const DispatchTask& t)
      : c_(c), t_(t), stages_(c, t.plan), layout_(stream_row_of(c, t)), copies_scales_(has_aligned_scales(t.args)) {}

  // next(chunk): the next one to be put; false where there is none.
  template <class Next>
  __device__ void run(Next&& next) {
    if (casts() && c_.per_expert) {
      while (next(chunk_)) cast_chunk();
      return;
    }
    move_items(
        stages_,
        [&](int stage, bool) {
          while (rows_left_ == 0) {
            if (!next(chunk_)) return false;
            enter();
          }
          load(stage);
          return true;
        },
        [&](int stage) { store(stage); });
    put_stored();
  }

 private:
  struct Item {
    Chunk chunk;
    char* out;  // where its row goes
    int piece;
    bool ends_chunk;
  };

  static constexpr int kItemsBetween = 2;  // stores of the next chunk, before a chunk is put

  __device__ static bool has_aligned_scales(const DispatchArgs& args) {
    const auto alignment = reinterpret_cast<uintptr_t>(args.scales) | static_cast<uintptr_t>(args.scales_pitch) |
                           static_cast<uintptr_t>(args.format.scale_bytes);
    return args.scales != nullptr && alignment % kRowAlignment == 0;
  }

  __device__ bool casts() const { return t_.args.cast != Cast::kNone; }
  __device__ int piece_bytes(int piece) const {
    const int row = casts() ? static_cast<int>(c_.shape.max_payload_bytes()) : t_.args.format.payload_bytes;
    return min(t_.plan.chunk_bytes, row - piece * t_.plan.chunk_bytes);
  }
  __device__ bool is_last(int piece) const { return piece == t_.plan.num_chunks - 1; }
  __device__ const char* row_of(int token) const {
    return static_cast<const char*>(t_.args.x) + token * t_.args.x_pitch;
  }
  __device__ const char* scales_of(int token) const {
    return static_cast<const char*>(t_.args.scales) + token * t_.args.scales_pitch;
  }

  // The chunk that is loaded from here on.
  __device__ void enter() {
    if (chunk_.round >= kStagedRounds) ptx::fence_proxy_async_global();  // its room was waited for by ordinary loads
    rows_left_ = chunk_.rows(c_);
    if (rows_left_ == 0) return put_chunk(c_, chunk_, layout_.bytes);  // the first of a round, which says so
    const Stream stream = stream_of(c_, chunk_.stream);
    tokens_ = t_.source.stream_tokens + int64_t{chunk_.stream} * t_.args.num_tokens +
              rows_before_round(c_, t_, chunk_.stream, chunk_.round) + chunk_.first_row(c_);
    out_ = row_out(c_, stream, chunk_.round, chunk_.first_row(c_), layout_.bytes);
    first_expert_ = stream.node * c_.sizes.node_num_experts;
    row_ = 0;
    fetch_tokens();
    fetch_route();
  }

  // The lanes hold the tokens of 32 rows.
  __device__ void fetch_tokens() { token_ = lane_idx() < rows_left_ ? tokens_[row_ + lane_idx()] : 0; }
  __device__ int token() const { return __shfl_sync(kFullWarp, token_, row_ % kWarpThreads); }

  // Of the lane's slot: what its route entry is made of, fetched while the row before is under way.
  __device__ void fetch_route() {
    const int64_t entry = int64_t{token()} * c_.shape.num_topk + lane_idx();
    if (t_.cached || lane_idx() >= c_.shape.num_topk) return;
    next_.expert = t_.source.experts[entry];
    next_.weight = t_.args.topk_weights != nullptr ? t_.args.topk_weights[entry] : 1.0f;
    next_.rank_row = t_.source.slot_places[entry];
    next_.expert_row = c_.per_expert ? t_.source.expert_places[entry] : -1;
  }
  __device__ RouteEntry route() const {
    const auto on_node = static_cast<uint32_t>(next_.expert - first_expert_);
    if (on_node < static_cast<uint32_t>(c_.sizes.node_num_experts)) return next_;
    return {-1, next_.weight, -1, -1};
  }

  __device__ void next_row() {
    ++row_;
    --rows_left_;
    out_ += layout_.bytes;
    if (rows_left_ == 0) return;
    if (row_ % kWarpThreads == 0) fetch_tokens();
    fetch_route();
  }

  // Behind the payload: scales, then route entries. Of a cast every piece has its scales, at a place of their own.
  __device__ char* side_of(int stage, int piece) const {
    return stages_.payload(stage) + (casts() ? t_.plan.side_offset : piece_bytes(piece));
  }
  __device__ int group_bytes() const { return t_.args.scale_format == ScaleFormat::kUE8M0 ? 1 : 4; }
  __device__ int scale_bytes(int piece) const {
    if (!casts()) return is_last(piece) ? t_.args.format.scale_span() : 0;
    return align_up(ceil_div(piece_bytes(piece) / 2, kScaleGroupChannels) * group_bytes(), kRowAlignment);
  }
  __device__ int side_bytes(int piece) const {
    return scale_bytes(piece) + (is_last(piece) ? static_cast<int>(layout_.bytes - layout_.routes_offset) : 0);
  }

  __device__ void load(int stage) {
    const int from = token(), bytes = piece_bytes(piece_);
    char* side = side_of(stage, piece_);
    if (is_last(piece_)) {
      if (t_.args.scales != nullptr && !copies_scales_) {
        load_bytes(side, scales_of(from), t_.args.format.scale_bytes);
        ptx::async_wait();
      }
      if (!t_.cached && lane_idx() < c_.shape.num_topk) {
        reinterpret_cast<RouteEntry*>(side + scale_bytes(piece_))[lane_idx()] = route();
      }
    }
    // Before bulk stores of what has been written; after a cast, before the load.
    if (is_last(piece_) || casts()) ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane_idx() == 0) {
      stages_.item<Item>(stage) = {chunk_, out_, piece_, is_last(piece_) && rows_left_ == 1};
      uint64_t* full = stages_.full + stage;
      const int scales = is_last(piece_) && copies_scales_ ? t_.args.format.scale_bytes : 0;
      ptx::mbarrier_arrive_expect_tx(full, bytes + scales);
      ptx::bulk_load(stages_.payload(stage), row_of(from) + piece_ * t_.plan.chunk_bytes, bytes, full);
      if (scales > 0) ptx::bulk_load(side, scales_of(from), scales, full);
    }
    __syncwarp();
    if (!is_last(piece_)) {
      ++piece_;
    } else {
      piece_ = 0;
      next_row();
    }
  }

  __device__ void store(int stage) {
    const Item item = stages_.item<Item>(stage);
    const int side = side_bytes(item.piece);
    int payload = piece_bytes(item.piece), offset = item.piece * t_.plan.chunk_bytes;
    if (casts()) {
      payload /= 2;
      offset /= 2;
      char* scales = side_of(stage, item.piece);
      cast_in_place(stages_.payload(stage), scales, payload, t_.args.cast, t_.args.scale_format);
      ptx::fence_proxy_async_shared();
      __syncwarp();
      char* to = item.out + layout_.side_offset + offset / kScaleGroupChannels * group_bytes();
      if (lane_idx() == 0) ptx::bulk_store(to, scales, side);
    } else {
      payload += side;
    }
    if (lane_idx() == 0) ptx::bulk_store(item.out + offset, stages_.payload(stage), payload);
    // The chunk before this one is put when its stores have had time to complete.
    if (since_stored_ >= 0 && ++since_stored_ == kItemsBetween) {
      ptx::bulk_wait<kItemsBetween - 1>();
      put(stored_);
    }
    if (!item.ends_chunk) return;
    put_stored();
    stored_ = item.chunk;
    since_stored_ = 0;
  }

  __device__ void put_stored() {
    if (since_stored_ < 0) return;
    ptx::bulk_wait<0>();
    put(stored_);
  }
  __device__ void put(const Chunk& chunk) {
    __syncwarp();
    put_chunk(c_, chunk, layout_.bytes);
    since_stored_ = -1;
  }

  // Where rows are pulled the rings are for rows that are FP8 already.
  __device__ void cast_chunk() {
    enter();
    if (rows_left_ == 0) return;
    while (rows_left_ > 0) {
      cast_row<CastLoads::kInTurn>(row_of(token()), out_, out_ + layout_.side_offset, c_.shape.hidden, t_.args.cast,
                                   t_.args.scale_format);
      if (!t_.cached && lane_idx() < c_.shape.num_topk) {
        reinterpret_cast<RouteEntry*>(out_ + layout_.routes_offset)[lane_idx()] = route();
      }
      next_row();
    }
    put(chunk_);
  }

  const Context& c_;
  const DispatchTask& t_;
  const Stages stages_;
  const StreamRow layout_;
  const bool copies_scales_;  // in bulk
  // What is loaded: the chunk, its row, the piece of that.
  Chunk chunk_{};
  int row_ = 0;
  int rows_left_ = 0;
  int piece_ = 0;
  char* out_ = nullptr;              // where the row goes
  const int32_t* tokens_ = nullptr;  // of the chunk's rows
  int32_t token_ = 0;                // by lane, of 32 rows
  int first_expert_ = 0;             // of the node
  RouteEntry next_{-1, 0.0f, -1, -1};
  Chunk stored_{};         // that is to be put
  int since_stored_ = -1;  // items that have been stored behind it; negative where there is none
};

}  // namespace deep_a2a::cuda
