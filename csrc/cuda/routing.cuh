// Route records: written by the source, read by the receiver.
#pragma once

#include "cuda/bases.cuh"

namespace deep_a2a::cuda {

__device__ inline RouteRecord own_record(const Context& c, const DispatchTask& t, int64_t rank_row) {
  char* records = c.own(Region::kRecvRoutes, t.args.slot);
  return RouteRecord::at(c.shape, records + rank_row * c.sizes.record_bytes);
}

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

// What a lane sends: kWidth top-k slots of a token to one rank of the node.
template <int kWidth>
struct alignas(4 * kWidth) SentRoutes {
  int32_t experts[kWidth];
  float weights[kWidth];
  int32_t rows[kWidth];  // places of expert rows, until bases are added
  int32_t place = -1;    // of the rank row; -1 for none
};

// The same slots of one token after another, for one rank.
template <int kWidth>
class RouteSender {
 public:
  __device__ RouteSender(const Context& c, const DispatchTask& t, int local, int slot)
      : c_(c),
        t_(t),
        local_(local),
        slot_(slot),
        base_(c.shared.rank_bases[local]),
        records_(c.region(local, Region::kRecvRoutes, t.args.slot)) {}

  __device__ void fetch(int token, SentRoutes<kWidth>& routes) const {
    const int64_t entry = int64_t{token} * c_.shape.num_topk + slot_;
    routes.place = t_.source.rank_places[int64_t{token} * c_.num_locals() + local_];
    copy_words<kWidth>(routes.experts, t_.source.experts + entry);
    if (c_.per_expert) copy_words<kWidth>(routes.rows, t_.source.expert_places + entry);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {  // the caller's weights lie as they like
      routes.weights[i] = t_.args.topk_weights != nullptr ? t_.args.topk_weights[entry + i] : 1.0f;
    }
  }

  __device__ void send(int token, SentRoutes<kWidth>& routes, const int32_t* expert_bases) const {
    if (routes.place < 0) return;
    const RouteRecord to = RouteRecord::at(c_.shape, records_ + int64_t{routes.place + base_} * c_.sizes.record_bytes);
    copy_words<kWidth>(to.experts + slot_, routes.experts);
    copy_words<kWidth>(to.weights + slot_, routes.weights);
    if (!c_.per_expert) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      routes.rows[i] = routes.experts[i] < 0 ? -1 : routes.rows[i] + expert_bases[routes.experts[i]];
    }
    copy_words<kWidth>(to.expert_rows + slot_, routes.rows);
    if (slot_ == 0) *to.from_row = token;
  }

 private:
  const Context& c_;
  const DispatchTask& t_;
  const int local_;
  const int slot_;
  const int32_t base_;
  char* const records_;
};

// A warp sends as many tokens at a time as it has lanes for their records.
template <int kWidth>
__device__ inline void send_records(const Context& c, const DispatchTask& t, int first_warp) {
  constexpr int kTogether = kWidth == 4 ? 2 : 1;  // to wait for them together
  const int32_t* expert_bases = BasesArena(c, t.plan).expert_bases;
  const int of_record = c.shape.num_topk / kWidth, of_token = of_record * c.num_locals();
  const int tokens = max(1, kWarpThreads / of_token);
  const int begin = grid_warp_idx(first_warp) * tokens + lane_idx() / of_token, step = all_warps(first_warp) * tokens;
  if (lane_idx() / of_token >= tokens) return;
#pragma unroll 1
  for (int part = lane_idx() % of_token; part < of_token; part += kWarpThreads) {
    const int local = (part / of_record + c.local_rank() + 1) % c.num_locals();
    const RouteSender<kWidth> sender(c, t, local, part % of_record * kWidth);
#pragma unroll 1
    for (int first = begin; first < t.args.num_tokens; first += kTogether * step) {
      SentRoutes<kWidth> routes[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i * step < t.args.num_tokens) sender.fetch(first + i * step, routes[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sender.send(first + i * step, routes[i], expert_bases);
    }
  }
}

// D4: the records go to the receivers of the node. By the warps from `first_warp` on.
__device__ inline void d4_send_records(const Context& c, const DispatchTask& t, int first_warp) {
  if (c.shape.num_topk % 4 == 0) {
    send_records<4>(c, t, first_warp);
  } else {
    send_records<1>(c, t, first_warp);
  }
}

// What a receiver keeps of kWidth top-k slots of a rank row: nothing of other ranks' experts.
template <int kWidth>
struct alignas(4 * kWidth) KeptRoutes {
  int32_t experts[kWidth];
  float weights[kWidth];
  int32_t rows[kWidth];
};

template <int kWidth>
__device__ inline void write_routes(const ReceivedRouting& to, int64_t entry, const KeptRoutes<kWidth>& routes) {
  copy_words<kWidth>(to.topk_idx + entry, routes.experts);
  copy_words<kWidth>(to.topk_weights + entry, routes.weights);
  if (to.expert_rows != nullptr) copy_words<kWidth>(to.expert_rows + entry, routes.rows);
}

// kWidth slots of a rank row that has come, and into the handle what only pulling needs.
template <int kWidth>
__device__ inline void read_routes(const Context& c, const DispatchTask& t, const ReceivedRouting& kept, int row,
                                   int slot, KeptRoutes<kWidth>& routes) {
  const int64_t entry = int64_t{row} * c.shape.num_topk + slot;
  if (t.cached) {
    copy_words<kWidth>(routes.experts, kept.topk_idx + entry);
    copy_words<kWidth>(routes.weights, kept.topk_weights + entry);
    if (c.per_expert) copy_words<kWidth>(routes.rows, kept.expert_rows + entry);
    return;
  }
  const RouteRecord record = own_record(c, t, row);
  copy_words<kWidth>(routes.experts, record.experts + slot);
  copy_words<kWidth>(routes.weights, record.weights + slot);
  if (!c.per_expert) return;
  copy_words<kWidth>(routes.rows, record.expert_rows + slot);
  if (slot == 0) kept.from_row[row] = *record.from_row;
}

// Of the slots of a row that has not come, and of those whose experts are at other ranks, nothing is left. The handle
// has local experts.
template <int kWidth>
__device__ inline void keep_own(const Context& c, const DispatchTask& t, bool has_come, KeptRoutes<kWidth>& routes) {
  const int first = t.cached ? 0 : c.sizes.first_expert;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int expert = routes.experts[i] - first;
    const bool own = has_come && static_cast<uint32_t>(expert) < static_cast<uint32_t>(c.sizes.num_local_experts);
    routes.experts[i] = own ? expert : -1;
    routes.weights[i] = own ? routes.weights[i] : 0.0f;
    routes.rows[i] = own && c.per_expert ? routes.rows[i] : -1;
  }
}

// A warp has as many rows at a time as it has lanes for their slots.
template <int kWidth>
__device__ inline void keep_routing(const Context& c, const DispatchTask& t, int first_warp) {
  constexpr int kTogether = kWidth == 4 ? 2 : 1;  // to wait for them together
  const int num_rows = ReceivedCounts::at(c.shape, t.kept.counts).num_received[1];
  const int capacity = static_cast<int>(t.result.capacity), of_row = c.shape.num_topk / kWidth;
  const ReceivedRouting kept = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  const ReceivedRouting result = ReceivedRouting::at(c.shape, t.result.capacity, t.result.routing);
  const int rows = kWarpThreads / of_row;
  const int step = all_warps(first_warp) * rows, slot = lane_idx() % of_row * kWidth;
  if (lane_idx() / of_row >= rows) return;
#pragma unroll 1
  for (int first = grid_warp_idx(first_warp) * rows + lane_idx() / of_row; first < capacity;
       first += kTogether * step) {
    KeptRoutes<kWidth> routes[kTogether]{};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * step < num_rows) read_routes<kWidth>(c, t, kept, first + i * step, slot, routes[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = first + i * step;
      if (row >= capacity) break;
      keep_own<kWidth>(c, t, row < num_rows, routes[i]);
      const int64_t entry = int64_t{row} * c.shape.num_topk + slot;
      if (!t.cached) write_routes<kWidth>(kept, entry, routes[i]);
      write_routes<kWidth>(result, entry, routes[i]);
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
