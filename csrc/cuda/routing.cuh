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

// What a receiver keeps of kWidth top-k slots of a rank row: nothing of other ranks' experts.
template <int kWidth>
struct alignas(4 * kWidth) KeptRoutes {
  int32_t experts[kWidth];
  float weights[kWidth];
  int32_t rows[kWidth];
};

// kWidth words that follow each other, in one access.
template <int kWidth, class T>
__device__ inline void copy_words(T* to, const T* from) {
  static_assert(sizeof(T) == 4 && (kWidth == 1 || kWidth == 4), "a word, or 16 bytes");
  if constexpr (kWidth == 4) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    *to = *from;
  }
}

template <int kWidth>
__device__ inline void write_routes(const ReceivedRouting& to, int64_t entry, const KeptRoutes<kWidth>& routes) {
  copy_words<kWidth>(to.topk_idx + entry, routes.experts);
  copy_words<kWidth>(to.topk_weights + entry, routes.weights);
  if (to.expert_rows != nullptr) copy_words<kWidth>(to.expert_rows + entry, routes.rows);
}

// The routing of the entries from `entry` on, and into the handle what only pulling needs.
template <int kWidth>
__device__ inline KeptRoutes<kWidth> received_routes(const Context& c, const DispatchTask& t,
                                                     const ReceivedRouting& kept, unsigned entry,
                                                     unsigned num_entries) {
  alignas(16) KeptRoutes<kWidth> routes{};
  bool own[kWidth] = {};
  if (entry < num_entries) {
    const bool per_expert = c.shape.row_per_expert();
    if (t.cached) {
      copy_words<kWidth>(routes.experts, kept.topk_idx + entry);
      copy_words<kWidth>(routes.weights, kept.topk_weights + entry);
      if (per_expert) copy_words<kWidth>(routes.rows, kept.expert_rows + entry);
    } else {
      const auto topk = static_cast<unsigned>(c.shape.num_topk);
      const unsigned slot = entry % topk;
      const RouteRecord record = own_record(c, t, entry / topk);
      copy_words<kWidth>(routes.experts, record.experts + slot);
      copy_words<kWidth>(routes.weights, record.weights + slot);
      if (per_expert) copy_words<kWidth>(routes.rows, record.expert_rows + slot);
      if (per_expert && slot == 0) kept.from_row[entry / topk] = *record.from_row;
    }
    const int first = t.cached ? 0 : c.sizes.first_expert;  // the handle has local experts
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      routes.experts[i] -= first;
      own[i] = static_cast<uint32_t>(routes.experts[i]) < static_cast<uint32_t>(c.sizes.num_local_experts);
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (!own[i]) routes.experts[i] = -1, routes.weights[i] = 0.0f;
    if (!own[i] || !c.shape.row_per_expert()) routes.rows[i] = -1;
  }
  return routes;
}

template <int kWidth>
__device__ inline void keep_routing(const Context& c, const DispatchTask& t, int first_warp) {
  constexpr unsigned kTogether = kWidth == 4 ? 4 : 1;  // to wait for them together
  const auto topk = static_cast<unsigned>(c.shape.num_topk);
  const unsigned num_entries = static_cast<unsigned>(ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]) * topk;
  const unsigned all_entries = static_cast<unsigned>(t.result.capacity) * topk;
  const ReceivedRouting kept = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  const ReceivedRouting result = ReceivedRouting::at(c.shape, t.result.capacity, t.result.routing);
  const unsigned step = gridDim.x * static_cast<unsigned>(num_warps() - first_warp) * kWarpThreads * kWidth;
  const auto warp = static_cast<unsigned>(warp_idx() - first_warp) * gridDim.x + blockIdx.x;
  const unsigned first = (warp * kWarpThreads + static_cast<unsigned>(lane_idx())) * kWidth;
  for (unsigned entry = first; entry < all_entries; entry += kTogether * step) {
    KeptRoutes<kWidth> routes[kTogether];
#pragma unroll
    for (unsigned i = 0; i < kTogether; ++i) {
      routes[i] = received_routes<kWidth>(c, t, kept, entry + i * step, num_entries);
    }
#pragma unroll
    for (unsigned i = 0; i < kTogether; ++i) {
      if (entry + i * step >= all_entries) break;
      if (!t.cached) write_routes<kWidth>(kept, entry + i * step, routes[i]);
      write_routes<kWidth>(result, entry + i * step, routes[i]);
    }
  }
}

// D6: the routing of the rank rows into the handle and the result; a cached dispatch copies it from the handle. What
// lies behind the rows is filled with no expert. By the warps from `first_warp` on.
__device__ inline void d6_keep_routing(const Context& c, const DispatchTask& t, int first_warp) {
  if (warp_idx() < first_warp) return;
  if (c.shape.num_topk % 4 == 0) {
    keep_routing<4>(c, t, first_warp);
  } else {
    keep_routing<1>(c, t, first_warp);
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
