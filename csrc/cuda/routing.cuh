// Route records: in layout kRank sent beside the rows, else by D1; read by the receiver.
#pragma once

#include "cuda/bases.cuh"

namespace deep_a2a::cuda {

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

// What a lane sends in layout kRank: kWidth top-k slots of a token to one rank of the node.
template <int kWidth>
struct alignas(4 * kWidth) SentRoutes {
  int32_t experts[kWidth];
  float weights[kWidth];
  int32_t place = -1;  // of the rank row; -1 for none
};

template <int kWidth>
__device__ inline void fetch_routes(const Context& c, const DispatchTask& t, int token, int slot, int local,
                                    SentRoutes<kWidth>& routes) {
  const int64_t entry = int64_t{token} * c.shape.num_topk + slot;
  routes.place = t.source.rank_places[int64_t{token} * c.num_locals() + local];
  copy_words<kWidth>(routes.experts, t.source.experts + entry);
  if (t.cached) return copy_words<kWidth>(routes.weights, t.source.weights + entry);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {  // the caller's weights lie as they like
    routes.weights[i] = t.args.topk_weights != nullptr ? t.args.topk_weights[entry + i] : 1.0f;
  }
  if (local == c.local_rank()) copy_words<kWidth>(t.source.weights + entry, routes.weights);  // for cached dispatches
}

// A warp sends as many tokens at a time as it has lanes for their records.
template <int kWidth>
__device__ inline void send_records(const Context& c, const DispatchTask& t, int first_warp) {
  constexpr int kTogether = kWidth == 4 ? 2 : 1;  // to wait for them together
  const int of_record = c.shape.num_topk / kWidth, of_token = of_record * c.num_locals();
  const int tokens = max(1, kWarpThreads / of_token);
  const int begin = grid_warp_idx(first_warp) * tokens + lane_idx() / of_token, step = all_warps(first_warp) * tokens;
  if (lane_idx() / of_token >= tokens) return;
#pragma unroll 1
  for (int part = lane_idx() % of_token; part < of_token; part += kWarpThreads) {
    const int local = (part / of_record + c.local_rank() + 1) % c.num_locals(), slot = part % of_record * kWidth;
    const int32_t base = t.cached ? t.source.rank_bases[local] : c.shared.rank_bases[local];
#pragma unroll 1
    for (int first = begin; first < t.args.num_tokens; first += kTogether * step) {
      SentRoutes<kWidth> routes[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i * step < t.args.num_tokens) fetch_routes(c, t, first + i * step, slot, local, routes[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (routes[i].place < 0) continue;
        const RouteRecord to = RouteRecord::at(c.shape, c.record(local, int64_t{base} + routes[i].place));
        copy_words<kWidth>(to.experts + slot, routes[i].experts);
        copy_words<kWidth>(to.weights + slot, routes[i].weights);
      }
    }
  }
}

// D4, layout kRank: the records go to the receivers of the node. By the warps from `first_warp` on.
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
  int32_t rows[kWidth];  // as they came, which may be places, then final
  int source = 0;
};

template <int kWidth>
__device__ inline void write_routes(const ReceivedRouting& to, int64_t entry, const KeptRoutes<kWidth>& routes) {
  copy_words<kWidth>(to.topk_idx + entry, routes.experts);
  copy_words<kWidth>(to.topk_weights + entry, routes.weights);
  if (to.expert_rows != nullptr) copy_words<kWidth>(to.expert_rows + entry, routes.rows);
}

// In layout kRank the routing comes with the rows even of a cached dispatch.
__device__ inline bool has_kept_routing(const Context& c, const DispatchTask& t) { return t.cached && c.per_expert; }

// The records of rank rows that have come, for lanes that go through them in ascending order.
class ReceivedRecords {
 public:
  __device__ ReceivedRecords(const Context& c, const BasesArena& bases) : c_(c), starts_(bases.source_starts) {}

  __device__ RouteRecord at(int row) {
    if (!c_.per_expert) return RouteRecord::at(c_.shape, c_.record(c_.local_rank(), row));
#pragma unroll 1
    while (row >= starts_[source_ + 1]) ++source_;
    return RouteRecord::at(c_.shape, c_.record_of_source(c_.local_rank(), source_, row - starts_[source_]));
  }
  // Of the last one.
  __device__ int source() const { return source_; }

 private:
  const Context& c_;
  const int32_t* starts_;
  int source_ = 0;
};

// kWidth slots of a rank row that has come, and into the handle what only pulling needs.
template <int kWidth>
__device__ inline void read_routes(const Context& c, const DispatchTask& t, const ReceivedRouting& kept,
                                   ReceivedRecords& records, int row, int slot, KeptRoutes<kWidth>& routes) {
  if (has_kept_routing(c, t)) {
    const int64_t entry = int64_t{row} * c.shape.num_topk + slot;
    copy_words<kWidth>(routes.experts, kept.topk_idx + entry);
    copy_words<kWidth>(routes.weights, kept.topk_weights + entry);
    copy_words<kWidth>(routes.rows, kept.expert_rows + entry);
    return;
  }
  const RouteRecord record = records.at(row);
  routes.source = records.source();
  copy_words<kWidth>(routes.experts, record.experts + slot);
  copy_words<kWidth>(routes.weights, record.weights + slot);
  if (!c.per_expert) return;
  copy_words<kWidth>(routes.rows, record.expert_rows + slot);
  if (slot == 0) kept.from_row[row] = *record.from_row;
}

// The row of `x` that an own expert gets, of a place at the source.
__device__ inline int32_t expert_row(const Context& c, const BasesArena& bases, int source, int own_expert,
                                     int32_t place) {
  return bases.own_offsets[own_expert] + bases.source_bases[source * c.sizes.num_local_experts + own_expert] + place;
}

// Of the slots of a row that has not come, and of those whose experts are at other ranks, nothing is left. The handle
// has local experts.
template <int kWidth>
__device__ inline void keep_own(const Context& c, const DispatchTask& t, const BasesArena& bases, bool has_come,
                                KeptRoutes<kWidth>& routes) {
  const int first = has_kept_routing(c, t) ? 0 : c.sizes.first_expert;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int expert = routes.experts[i] - first;
    const bool own = has_come && static_cast<uint32_t>(expert) < static_cast<uint32_t>(c.sizes.num_local_experts);
    routes.experts[i] = own ? expert : -1;
    routes.weights[i] = own ? routes.weights[i] : 0.0f;
    if (own && c.per_expert && !t.cached) routes.rows[i] = expert_row(c, bases, routes.source, expert, routes.rows[i]);
    routes.rows[i] = own && c.per_expert ? routes.rows[i] : -1;
  }
}

// A warp has as many rows at a time as it has lanes for their slots.
template <int kWidth>
__device__ inline void keep_routing(const Context& c, const DispatchTask& t, int first_warp) {
  constexpr int kTogether = kWidth == 4 ? 2 : 1;  // to wait for them together
  const int capacity = static_cast<int>(t.result.capacity), of_row = c.shape.num_topk / kWidth;
  const ReceivedRouting kept = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  const ReceivedRouting result = ReceivedRouting::at(c.shape, t.result.capacity, t.result.routing);
  const BasesArena bases(c, t.plan);
  const int num_rows = t.cached ? ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]
                                : bases.source_starts[c.num_ranks()];  // the handle's are block 0's to write
  ReceivedRecords records(c, bases);
  const int rows = kWarpThreads / of_row;
  const int step = all_warps(first_warp) * rows, slot = lane_idx() % of_row * kWidth;
  if (lane_idx() / of_row >= rows) return;
#pragma unroll 1
  for (int first = grid_warp_idx(first_warp) * rows + lane_idx() / of_row; first < capacity;
       first += kTogether * step) {
    KeptRoutes<kWidth> routes[kTogether]{};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * step < num_rows) read_routes<kWidth>(c, t, kept, records, first + i * step, slot, routes[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = first + i * step;
      if (row >= capacity) break;
      keep_own<kWidth>(c, t, bases, row < num_rows, routes[i]);
      const int64_t entry = int64_t{row} * c.shape.num_topk + slot;
      if (c.per_expert && !t.cached) write_routes<kWidth>(kept, entry, routes[i]);
      write_routes<kWidth>(result, entry, routes[i]);
    }
  }
}

// D6: the routing of the rank rows into the result, and where rows are per expert into the handle, from which a cached
// dispatch copies it. What lies behind the rows is filled with no expert. By the warps from `first_warp` on.
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
  const BasesArena bases(c, t.plan);
  const int32_t* all_rows = bases.source_bases + c.num_ranks() * c.sizes.num_local_experts;
  const auto zero = [&](Region region, int64_t first, int64_t end, int64_t pitch) {
    auto* rows = reinterpret_cast<uint4*>(c.own(region, t.args.slot) + first * pitch);
    for (int64_t i = threadIdx.x; i < (end - first) * pitch / 16; i += blockDim.x) rows[i] = make_uint4(0, 0, 0, 0);
  };
  for (int expert = blockIdx.x; expert < c.sizes.num_local_experts; expert += gridDim.x) {
    const int32_t offset = t.cached ? counts.expert_offsets[expert] : bases.own_offsets[expert];
    const int32_t rows = t.cached ? counts.rows_per_expert[expert] : all_rows[expert];
    const int64_t first = int64_t{offset} + rows, end = int64_t{offset} + group_rows(c.shape, rows);
    zero(Region::kRecvRows, first, end, t.args.format.payload_bytes);
    zero(Region::kRecvScales, first, end, t.args.format.scale_pitch());
  }
}

}  // namespace deep_a2a::cuda
