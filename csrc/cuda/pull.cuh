// D6 pull, layouts kExpert and kPadded: the receiver loads each row once from its source's window and stores it to the
// rows of all its experts here, so that the link carries it once.
#pragma once

#include "cuda/cast.cuh"
#include "cuda/routing.cuh"
#include "cuda/stages.cuh"

namespace deep_a2a::cuda {

// Before it is pulled, input lies in the source's window: rows in `input_rows`, or in `cast_rows` when cast by the
// source, a row's scales in `input_scales` at multiples of 128 bytes.
__device__ inline Region pulled_region(const DispatchTask& t) {
  return t.args.cast == Cast::kNone ? Region::kInputRows : Region::kCastRows;
}

// Given scales, to where peers find them, in pieces as large as their place allows; a warp for some rows at a time.
template <class Piece>
__device__ inline void copy_scale_rows(const DispatchTask& t, char* to, int to_pitch) {
  constexpr int kTogether = sizeof(Piece) == sizeof(uint4) ? 8 : 1;  // to wait for them together
  const int pieces = t.args.format.scale_bytes / static_cast<int>(sizeof(Piece)), step = all_warps();
  const auto* from = static_cast<const char*>(t.args.scales);
#pragma unroll 1
  for (int first = grid_warp_idx(); first < t.args.num_tokens; first += kTogether * step) {
#pragma unroll 1
    for (int piece = lane_idx(); piece < pieces; piece += kWarpThreads) {
      Piece values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int64_t token = min(first + i * step, t.args.num_tokens - 1);
        values[i] = reinterpret_cast<const Piece*>(from + token * t.args.scales_pitch)[piece];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int64_t token = first + i * step;
        if (token < t.args.num_tokens) reinterpret_cast<Piece*>(to + token * to_pitch)[piece] = values[i];
      }
    }
  }
}

// D4: what the source has to prepare in its own window; of a cast, a warp for each row.
__device__ inline void d4_prepare_input(const Context& c, const DispatchTask& t) {
  char* rows = c.own(Region::kCastRows, c.lane);
  char* scales = c.own(Region::kInputScales, c.lane);
  const int pitch = t.args.format.scale_pitch();
  if (t.args.cast != Cast::kNone) {
    for (int token = grid_warp_idx(); token < t.args.num_tokens; token += all_warps()) {
      const auto* from = static_cast<const char*>(t.args.x) + token * t.args.x_pitch;
      cast_row<CastLoads::kAhead>(from, rows + int64_t{token} * c.shape.hidden, scales + int64_t{token} * pitch,
                                  c.shape.hidden, t.args.cast, t.args.scale_format);
    }
  } else if (t.args.scales != nullptr) {
    const auto all = reinterpret_cast<uintptr_t>(t.args.scales) | static_cast<uintptr_t>(t.args.scales_pitch) |
                     static_cast<uintptr_t>(t.args.format.scale_bytes);
    if (all % sizeof(uint4) == 0) {
      copy_scale_rows<uint4>(t, scales, pitch);
    } else if (all % sizeof(uint32_t) == 0) {
      copy_scale_rows<uint32_t>(t, scales, pitch);
    } else {
      copy_scale_rows<char>(t, scales, pitch);
    }
  }
}

// As a lane sees it: expert and row of its top-k slot, or the row's place, and, all lanes alike, where the row comes
// from. Kept as they were loaded, and looked at only when the item is due: whoever looks has to wait for the memory.
struct PullItem {
  int32_t expert = -1;
  int32_t row = -1;
  int32_t source = -1;  // local rank, -1 where the item is none
  int32_t from_row = 0;
};

class Puller {
 public:
  __device__ Puller(const Context& c, const DispatchTask& t)
      : c_(c),
        t_(t),
        stages_(c, t.plan),
        counts_(ReceivedCounts::at(c.shape, t.kept.counts)),
        kept_(ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing)),
        bases_(c, t.plan),
        rows_(c.own(Region::kRecvRows, t.args.slot)),
        scales_(c.own(Region::kRecvScales, t.args.slot)) {
    if (t.cached) {
      find_in_handle();
    } else if (lane_idx() < c.num_locals()) {
      find_in_arena();
    }
  }

  // Items go round the sources of the node, starting behind the own rank, so that all links are busy at once.
  __device__ void run() {
    const int end = __reduce_max_sync(kFullWarp, rows_from_) * c_.num_locals();
    RowTasks rows(c_.control.grid.moved_rows, t_.plan.push_warps, end, kFixedRows);
    move_rows(
        stages_, rows, [&](int row) { return fetch(row, end); },
        [&](const PullItem& item, int, int chunk, int stage) { load(item, chunk, stage); },
        [&](int chunk, int stage) { store(chunk, stage); });
  }

 private:
  // The rank rows of the lane's source: rows are grouped by source.
  __device__ void find_in_arena() {
    const int source = c_.neighbour(lane_idx());
    start_of_ = bases_.source_starts[source];
    rows_from_ = bases_.source_starts[source + 1] - start_of_;
  }
  __device__ void find_in_handle() {
    int32_t before_node = 0;  // rank rows from nodes before the own one
    for (int rank = lane_idx(); rank < c_.neighbour(0); rank += kWarpThreads)
      before_node += counts_.rows_per_rank[rank];
    rows_from_ = lane_idx() < c_.num_locals() ? counts_.rows_per_rank[c_.neighbour(lane_idx())] : 0;
    int32_t rows = rows_from_;
    for (int step = 1; step < kWarpThreads; step *= 2) {
      const int32_t below = __shfl_up_sync(kFullWarp, rows, step);
      if (lane_idx() >= step) rows += below;
    }
    start_of_ = rows - rows_from_ + __reduce_add_sync(kFullWarp, before_node);
  }

  __device__ PullItem fetch(int row, int end) const {
    PullItem it;
    const int source = (c_.local_rank() + 1 + row % c_.num_locals()) % c_.num_locals();
    const int row_of_source = row / c_.num_locals();
    const int32_t rows = __shfl_sync(kFullWarp, rows_from_, source), start = __shfl_sync(kFullWarp, start_of_, source);
    if (row >= end || row_of_source >= rows) return it;
    it.source = source;
    if (t_.cached) {
      fetch_kept(it, start + row_of_source);
    } else {
      fetch_record(it, row_of_source);
    }
    return it;
  }

  __device__ void fetch_kept(PullItem& it, int64_t rank_row) const {
    it.from_row = kept_.from_row[rank_row];
    if (lane_idx() >= c_.shape.num_topk) return;
    it.expert = c_.sizes.first_expert;  // the handle has own experts alone
    it.row = kept_.expert_rows[rank_row * c_.shape.num_topk + lane_idx()];
  }
  __device__ void fetch_record(PullItem& it, int32_t place) const {
    const RouteRecord record =
        RouteRecord::at(c_.shape, c_.record_of_source(c_.local_rank(), c_.neighbour(it.source), place));
    it.from_row = *record.from_row;
    if (lane_idx() >= c_.shape.num_topk) return;
    it.expert = record.experts[lane_idx()];
    it.row = record.expert_rows[lane_idx()];
  }

  // What was fetched of the lane's slot, made final.
  __device__ int32_t row_of(const PullItem& it) const {
    if (!c_.is_own_expert(it.expert)) return -1;
    if (t_.cached) return it.row;
    return expert_row(c_, bases_, c_.neighbour(it.source), it.expert - c_.sizes.first_expert, it.row);
  }

  __device__ int chunk_bytes(int chunk) const {
    return min(t_.plan.chunk_bytes, t_.args.format.payload_bytes - chunk * t_.plan.chunk_bytes);
  }

  __device__ void load(const PullItem& it, int chunk, int stage) {
    const int span = t_.args.format.scale_span();
    stages_.keep_row(stage, row_of(it));
    if (span > 0) ptx::fence_proxy_async_shared();  // scales have been read by ordinary loads
    __syncwarp();
    if (lane_idx() != 0) return;
    uint64_t* full = stages_.full + stage;
    if (it.source < 0) {
      ptx::mbarrier_arrive(full);
      return;
    }
    const char* rows = c_.region(it.source, pulled_region(t_), c_.lane) + chunk * t_.plan.chunk_bytes;
    const bool with_scales = chunk == 0 && span > 0;
    ptx::mbarrier_arrive_expect_tx(full, chunk_bytes(chunk) + (with_scales ? span : 0));
    ptx::bulk_load(stages_.payload(stage), rows + int64_t{it.from_row} * t_.args.format.payload_bytes,
                   chunk_bytes(chunk), full);
    if (!with_scales) return;
    const char* scales = c_.region(it.source, Region::kInputScales, c_.lane);
    ptx::bulk_load(stages_.scales(stage), scales + int64_t{it.from_row} * t_.args.format.scale_pitch(), span, full);
  }

  __device__ void store(int chunk, int stage) {
    const int64_t row = stages_.kept_row(stage);
    if (row >= 0) {
      char* to = rows_ + row * t_.args.format.payload_bytes + chunk * t_.plan.chunk_bytes;
      ptx::bulk_store(to, stages_.payload(stage), chunk_bytes(chunk));
    }
    if (chunk == 0) store_scales(stage, __ballot_sync(kFullWarp, row >= 0));
  }

  // By ordinary stores, as in Pusher: `targets` are the lanes that have a row.
  __device__ void store_scales(int stage, uint32_t targets) const {
    const int pitch = t_.args.format.scale_pitch();
    for (int offset = lane_idx() * 16; offset < t_.args.format.scale_span(); offset += kWarpThreads * 16) {
      const uint4 value = *reinterpret_cast<const uint4*>(stages_.scales(stage) + offset);
      for (uint32_t left = targets; left != 0; left &= left - 1) {
        const int64_t row = stages_.row_of(stage, __ffs(left) - 1);
        *reinterpret_cast<uint4*>(scales_ + row * pitch + offset) = value;
      }
    }
  }

  const Context& c_;
  const DispatchTask& t_;
  const Stages stages_;
  const ReceivedCounts counts_;
  const ReceivedRouting kept_;
  const BasesArena bases_;
  char* rows_;
  char* scales_;
  int32_t start_of_ = 0;   // the first rank row that comes from the lane's source, a rank of the node
  int32_t rows_from_ = 0;  // and how many do
};

}  // namespace deep_a2a::cuda
