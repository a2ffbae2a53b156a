// The side payload of combine: one FP32 value for each rank row and top-k slot, from the rank that has the slot's
// expert.
#pragma once

#include "cuda/context.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

// C1: of the own rank rows, where sources and relays can read it.
__device__ inline void c1_side(const Context& c, const CombineTask& t) {
  const int64_t entries = int64_t{ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]} * c.shape.num_topk;
  const ReceivedRouting routing = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  auto* out = reinterpret_cast<float*>(c.own(Region::kCombineSide, c.lane));
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t entry = first; entry < entries; entry += step) {
    if (c.per_expert) {
      const int32_t row = routing.expert_rows[entry];
      out[entry] = row >= 0 ? t.args.side[row] : 0.0f;
    } else {
      out[entry] = t.args.side[entry];
    }
  }
}

// Of a rank row at a rank of the node, once that is ready.
__device__ inline float side_of_row(const Context& c, int local, int64_t rank_row, int slot) {
  const auto* side = reinterpret_cast<const float*>(c.region(local, Region::kCombineSide, c.lane));
  return ptx::ld_relaxed_sys(side + rank_row * c.shape.num_topk + slot);
}

// Of a token's slot whose expert is on this node.
__device__ inline float side_of_token(const Context& c, const CombineTask& t, int64_t token, int local, int slot) {
  const int64_t place = t.source.rank_places[token * c.num_locals() + local];
  return side_of_row(c, local, place + t.source.rank_bases[local], slot);
}

// C2, where all experts are on this node; +0 without one.
__device__ inline void c2_gather_side(const Context& c, const CombineTask& t) {
  const int64_t entries = int64_t{t.num_tokens} * c.shape.num_topk;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t entry = first; entry < entries; entry += step) {
    const int expert = t.source.experts[entry];
    float value = 0.0f;
    if (expert >= 0) {
      value = side_of_token(c, t, entry / c.shape.num_topk, c.local_of_expert(expert),
                            static_cast<int>(entry % c.shape.num_topk));
    }
    t.args.side_out[entry] = value;
  }
}

// What one rank row takes on its way from GPU to GPU.
__device__ inline int64_t row_wire_bytes(const Context& c, const CombineTask& t) {
  return c.shape.max_payload_bytes() + (t.args.with_side ? c.shape.num_topk * 4 : 0);
}

}  // namespace deep_a2a::cuda
