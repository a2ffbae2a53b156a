// Route records: written by the source for rows that are pulled, read by the receiver at arrival.
#pragma once

#include "cuda/sync.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

__device__ inline RouteRecord own_record(const Context& c, const DispatchTask& t, int64_t rank_row) {
  char* records = c.own(Region::kRecvRoutes, t.args.slot);
  return RouteRecord::at(c.shape, records + rank_row * c.sizes.record_bytes);
}

// D4, rows that are pulled: the records alone go to the receivers. A warp takes as many (token, rank) pairs at a time
// as its lanes have top-k slots for.
__device__ inline void d4_send_records(const Context& c, const DispatchTask& t, const int32_t* expert_bases) {
  int slots = 1;
  while (slots < c.shape.num_topk) slots *= 2;
  const int together = kWarpThreads / slots, slot = lane_idx() % slots;
  const int pairs = t.args.num_tokens * c.num_locals(), step = num_warps() * static_cast<int>(gridDim.x) * together;
#pragma unroll 4
  for (int pair = grid_warp_idx() * together + lane_idx() / slots; pair < pairs; pair += step) {
    const int token = pair / c.num_locals(), local = (pair + c.local_rank() + 1) % c.num_locals();
    const int64_t entry = int64_t{token} * c.shape.num_topk + min(slot, c.shape.num_topk - 1);
    const int32_t place = t.source.rank_places[int64_t{token} * c.num_locals() + local];
    const int32_t expert = t.source.experts[entry], expert_place = t.source.expert_places[entry];
    const float weight = t.args.topk_weights != nullptr ? t.args.topk_weights[entry] : 1.0f;
    if (place < 0 || slot >= c.shape.num_topk) continue;
    char* records = c.region(local, Region::kRecvRoutes, t.args.slot);
    const int64_t row = place + c.shared.rank_bases[local];
    const RouteRecord to = RouteRecord::at(c.shape, records + row * c.sizes.record_bytes);
    if (slot == 0) *to.from_row = token;
    to.experts[slot] = expert;
    to.weights[slot] = weight;
    to.expert_rows[slot] = expert < 0 ? -1 : expert_place + expert_bases[expert];
  }
}

// What a receiver keeps of one top-k slot of a rank row: nothing of other ranks' experts.
struct KeptRoute {
  int32_t expert = -1;
  float weight = 0.0f;
  int32_t row = -1;
};

__device__ inline KeptRoute kept_route(const Context& c, const RouteRecord& record, int slot) {
  const int32_t expert = record.experts[slot], row = c.shape.row_per_expert() ? record.expert_rows[slot] : -1;
  const float weight = record.weights[slot];
  if (!c.is_own_expert(expert)) return {};
  return {expert - c.sizes.first_expert, weight, row};
}

__device__ inline void write_route(const ReceivedRouting& to, int64_t entry, const KeptRoute& route) {
  to.topk_idx[entry] = route.expert;
  to.topk_weights[entry] = route.weight;
  if (to.expert_rows != nullptr) to.expert_rows[entry] = route.row;
}

// The routing of entry `entry` of the rank rows, and into the handle what only pulling needs.
__device__ inline KeptRoute received_route(const Context& c, const DispatchTask& t, const ReceivedRouting& kept,
                                           unsigned entry, unsigned num_entries) {
  if (entry >= num_entries) return {};
  if (t.cached) {
    return {kept.topk_idx[entry], kept.topk_weights[entry], kept.expert_rows == nullptr ? -1 : kept.expert_rows[entry]};
  }
  const unsigned topk = static_cast<unsigned>(c.shape.num_topk);
  const RouteRecord record = own_record(c, t, entry / topk);
  if (kept.from_row != nullptr && entry % topk == 0) kept.from_row[entry / topk] = *record.from_row;
  return kept_route(c, record, static_cast<int>(entry % topk));
}

// D6: the routing of the rank rows into the handle and the result; a cached dispatch copies it from the handle. What
// lies behind the rows is filled with no expert. A thread takes several entries at a time, to wait for them together.
__device__ inline void d6_keep_routing(const Context& c, const DispatchTask& t) {
  constexpr int kTogether = 4;
  const auto topk = static_cast<unsigned>(c.shape.num_topk);
  const unsigned num_entries = static_cast<unsigned>(ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]) * topk;
  const unsigned all_entries = static_cast<unsigned>(t.result.capacity) * topk;
  const ReceivedRouting kept = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  const ReceivedRouting result = ReceivedRouting::at(c.shape, t.result.capacity, t.result.routing);
  const unsigned step = gridDim.x * blockDim.x;
  for (unsigned first = blockIdx.x * blockDim.x + threadIdx.x; first < all_entries; first += kTogether * step) {
    KeptRoute routes[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) routes[i] = received_route(c, t, kept, first + i * step, num_entries);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * step >= all_entries) break;
      if (!t.cached) write_route(kept, first + i * step, routes[i]);
      write_route(result, first + i * step, routes[i]);
    }
  }
}

// Rows between the groups, which belong to no token.
__device__ inline void d6_zero_padding(const Context& c, const DispatchTask& t) {
  const ReceivedCounts counts = ReceivedCounts::at(c.shape, t.kept.counts);
  const auto zero = [&](Region region, int64_t first, int64_t end, int64_t pitch) {
    auto* rows = reinterpret_cast<uint4*>(c.own(region, t.args.slot) + first * pitch);
    for (int64_t i = threadIdx.x; i < (end - first) * pitch / 16; i += blockDim.x) rows[i] = make_uint4(0, 0, 0, 0);
  };
  for (int expert = blockIdx.x; expert < c.sizes.num_local_experts; expert += gridDim.x) {
    const int64_t first = int64_t{counts.expert_offsets[expert]} + counts.rows_per_expert[expert];
    zero(Region::kRecvRows, first, counts.expert_offsets[expert + 1], t.args.format.payload_bytes);
    zero(Region::kRecvScales, first, counts.expert_offsets[expert + 1], t.args.format.scale_pitch());
  }
}

}  // namespace deep_a2a::cuda
