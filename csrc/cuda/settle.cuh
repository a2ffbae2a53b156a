// How a dispatch ends: what the last block writes down, and what is left of one that brought nothing.
#pragma once

#include "cuda/course.cuh"
#include "cuda/routing.cuh"

namespace deep_a2a::cuda {

// What one rank row of this source takes on its way to another GPU.
__device__ inline int64_t row_wire_bytes(const Context& c, const DispatchTask& t) {
  return t.args.format.payload_bytes + t.args.format.scale_span() + (has_kept_routing(c, t) ? 0 : c.sizes.record_bytes);
}

// What the last block writes down: the caller's counts, too, which a block that gives up has to find unwritten, or to
// clear for good. A dispatch that is refused has used its slot like any other: the host releases it.
__device__ inline void settle(const Context& c, const DispatchTask& t, Course course) {
  end(c);
  if (t.half == Half::kReceive) return;
  for (int64_t i = threadIdx.x; course == Course::kGoOn && i < ReceivedCounts::words(c.shape); i += blockDim.x) {
    t.result.counts[i] = t.kept.counts[i];
  }
  if (threadIdx.x != blockDim.x - 1) return;  // a thread that waits for nobody
  ++c.team.control->slots[t.args.slot].uses;
  if (course == Course::kRefused) {
    c.control.refused_epoch = c.epoch;
  } else {
    count_wire_bytes(c, t.source, row_wire_bytes(c, t));
  }
}

// By the last block, when all is there and settled. False where the kernel has to be left.
__device__ inline bool finish(const Context& c, const DispatchTask& t, Course course) {
  if (course == Course::kGoOn && t.half == Half::kSend) return true;
  give_lane_credit(c);
  const bool is_read = course == Course::kGoOn && c.per_expert;  // by peers, who pull
  return !is_read || wait_rows_read(c, Step::kD6Read);
}

// Of a dispatch that brought nothing: counts zero, and no expert in any slot. With such a handle combine gives zeros,
// and waits for no rows.
__device__ inline void clear_result(const Context& c, const DispatchTask& t) {
  const auto clear = [&](const ReceivedArrays& arrays) {
    for (int64_t i = threadIdx.x; i < ReceivedCounts::words(c.shape); i += blockDim.x) arrays.counts[i] = 0;
    if (arrays.routing == nullptr) return;
    const ReceivedRouting routing = ReceivedRouting::at(c.shape, arrays.capacity, arrays.routing);
    for (int64_t i = threadIdx.x; i < arrays.capacity * c.shape.num_topk; i += blockDim.x) {
      write_routes<1>(routing, i, {{-1}, {0.0f}, {-1}});
    }
  };
  clear(t.result);
  if (t.cached) return;
  clear(t.kept);
  for (int i = threadIdx.x; i < c.num_locals(); i += blockDim.x) t.source.rank_bases[i] = t.source.rank_rows[i] = 0;
  for (int64_t i = threadIdx.x; i < int64_t{t.args.num_tokens} * c.num_locals(); i += blockDim.x) {
    t.source.rank_places[i] = -1;
  }
  for (int64_t i = threadIdx.x; i < int64_t{t.args.num_tokens} * c.shape.num_topk; i += blockDim.x) {
    t.source.experts[i] = -1;
  }
  for (int i = threadIdx.x; i < num_streams(c); i += blockDim.x) t.source.stream_counts[i] = 0;
  for (int i = threadIdx.x; i < num_streams(c) * c.sizes.num_rounds; i += blockDim.x) {
    t.source.round_starts[i] = t.relay.round_rows[i] = 0;
  }
  for (int64_t i = threadIdx.x; i < int64_t{t.args.num_tokens} * num_streams(c); i += blockDim.x) {
    t.source.stream_rows[i] = -1;
  }
}

}  // namespace deep_a2a::cuda
