// D4 send, layout kRank: each row once into shared memory, from there once to every destination rank, straight to its
// final row. A cast to FP8 happens in between. Scales go along by ordinary stores: for the bulk engine of an SM a copy
// of a few bytes is as long as one of a kilobyte.
#pragma once

#include "cuda/cast.cuh"
#include "cuda/stages.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

class Pusher {
 public:
  __device__ Pusher(const Context& c, const DispatchTask& t)
      : c_(c),
        t_(t),
        stages_(c, t.plan),
        dest_((c.local_rank() + 1 + lane_idx()) % c.num_locals()),
        base_(lane_idx() >= c.num_locals() ? 0
              : t.cached                   ? t.source.rank_bases[dest_]
                                           : c.shared.rank_bases[dest_]) {
    if (lane_idx() >= c.num_locals()) return;
    rows_ = c.region(dest_, Region::kRecvRows, t.args.slot);
  }

  __device__ void d4_send_own_node() {
    RowTasks tokens(c_.control.grid.moved_rows, t_.plan.push_warps, t_.args.num_tokens, kFixedRows);
    move_rows(
        stages_, tokens, [&](int token) { return fetch_place(token); },
        [&](int32_t place, int token, int chunk, int stage) { load(place, token, chunk, stage); },
        [&](int chunk, int stage) { store(chunk, stage); });
  }

 private:
  // At the lane's destination.
  __device__ int32_t fetch_place(int token) const {
    if (token >= t_.args.num_tokens || lane_idx() >= c_.num_locals()) return -1;
    return t_.source.rank_places[int64_t{token} * c_.num_locals() + dest_];
  }

  __device__ bool casts() const { return t_.args.cast != Cast::kNone; }
  __device__ int input_bytes(int chunk) const {
    const int row = casts() ? static_cast<int>(c_.shape.max_payload_bytes()) : t_.args.format.payload_bytes;
    return min(t_.plan.chunk_bytes, row - chunk * t_.plan.chunk_bytes);
  }

  __device__ void load(int32_t place, int token, int chunk, int stage) {
    if (casts()) ptx::fence_proxy_async_shared();  // it has read and written what the load overwrites
    __syncwarp();
    const bool wanted = __any_sync(kFullWarp, place >= 0);
    if (lane_idx() == 0) load_payload(token, chunk, stages_.payload(stage), stages_.full + stage, wanted);
    stages_.keep_row(stage, place >= 0 ? place + base_ : -1);
    if (wanted && chunk == 0) load_scales(token, stage);
    __syncwarp();
  }

  __device__ void load_payload(int token, int chunk, char* to, uint64_t* full, bool wanted) const {
    if (!wanted) {
      ptx::mbarrier_arrive(full);
      return;
    }
    const auto* from = static_cast<const char*>(t_.args.x) + token * t_.args.x_pitch + chunk * t_.plan.chunk_bytes;
    ptx::mbarrier_arrive_expect_tx(full, input_bytes(chunk));
    ptx::bulk_load(to, from, input_bytes(chunk), full);
  }

  // Given scales lie as the caller likes.
  __device__ void load_scales(int token, int stage) const {
    if (t_.args.scales == nullptr) return;
    const char* from = static_cast<const char*>(t_.args.scales) + token * t_.args.scales_pitch;
    load_bytes(stages_.scales(stage), from, t_.args.format.scale_bytes);
  }

  __device__ void store(int chunk, int stage) {
    const int64_t row = stages_.kept_row(stage);
    if (!__any_sync(kFullWarp, row >= 0)) return;
    int payload = input_bytes(chunk), payload_offset = chunk * t_.plan.chunk_bytes;
    int scales = chunk == 0 ? t_.args.format.scale_span() : 0, scales_offset = 0;
    if (casts()) {
      const int group_bytes = t_.args.scale_format == ScaleFormat::kUE8M0 ? 1 : 4;
      scales_offset = payload_offset / 2 / kScaleGroupChannels * group_bytes;
      payload /= 2;
      payload_offset /= 2;
      scales = align_up(ceil_div(payload, kScaleGroupChannels) * group_bytes, kRowAlignment);
      cast_in_place(stages_.payload(stage), stages_.scales(stage), payload, t_.args.cast, t_.args.scale_format);
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }
    if (row >= 0) {
      ptx::bulk_store(rows_ + row * t_.args.format.payload_bytes + payload_offset, stages_.payload(stage), payload);
    }
    store_scales(stage, scales, scales_offset);
  }

  // A row's, to all its ranks.
  __device__ void store_scales(int stage, int scales, int scales_offset) const {
    if (scales == 0) return;
    ptx::async_wait();
    __syncwarp();
    const int64_t first = c_.team.layout.offset(Region::kRecvScales, t_.args.slot) + scales_offset;
    for (int offset = lane_idx() * 16; offset < scales; offset += kWarpThreads * 16) {
      const uint4 value = *reinterpret_cast<const uint4*>(stages_.scales(stage) + offset);
      for (int i = 0, dest = c_.local_rank(); i < c_.num_locals(); ++i) {
        if (++dest == c_.num_locals()) dest = 0;  // as dest_ of lane i
        const int64_t row = stages_.row_of(stage, i);
        if (row < 0) continue;
        char* to = c_.team.windows[dest] + first + row * t_.args.format.scale_pitch() + offset;
        *reinterpret_cast<uint4*>(to) = value;
      }
    }
  }

  const Context& c_;
  const DispatchTask& t_;
  const Stages stages_;
  const int dest_;      // the lane's destination rank, local; ranks start with different ones
  const int32_t base_;  // of this source's rows there
  char* rows_ = nullptr;
};

}  // namespace deep_a2a::cuda
