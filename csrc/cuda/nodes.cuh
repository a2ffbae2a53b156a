// Dispatch across nodes: rows are packed into streams and put to the rail peers (D4), count vectors are handed on (D2),
// and what comes from rail peers is stored to its final rows (D5). docs/protocol.md has the steps.
#pragma once

#include "cuda/bases.cuh"
#include "cuda/cast.cuh"
#include "cuda/routing.cuh"
#include "cuda/stages.cuh"

namespace deep_a2a::cuda {

// A row is copied by a warp, 16 bytes a lane, several at a time; `use` stores what it is given.
template <class Use>
__device__ void for_vectors_of(const char* from, int64_t bytes, Use&& use) {
  constexpr int kTogether = 4;
  const int64_t count = bytes / 16, lanes = kWarpThreads;
  const auto* source = reinterpret_cast<const uint4*>(from);
  for (int64_t first = lane_idx(); first < count; first += kTogether * lanes) {
    uint4 values[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * lanes < count) values[i] = source[first + i * lanes];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * lanes < count) use((first + i * lanes) * 16, values[i]);
    }
  }
}

__device__ inline void copy_vectors(char* to, const char* from, int64_t bytes) {
  for_vectors_of(from, bytes, [&](int64_t at, const uint4& value) { *reinterpret_cast<uint4*>(to + at) = value; });
}

__device__ inline StreamRow stream_row_of(const Context& c, const DispatchTask& t) {
  return StreamRow::dispatch(c.shape, t.args.format, t.cached);
}

// Calls use(stream, chunk, first row, end row) for the warp's share of all chunks, streams by turns.
template <class RowsOf, class Use>
__device__ void for_chunks(const Context& c, RowsOf&& rows_of, Use&& use) {
  const int streams = num_streams(c), rows = chunk_rows(c), step = num_warps() * static_cast<int>(gridDim.x);
  for (int i = grid_warp_idx(); i < streams * max_chunks(c.shape); i += step) {
    const Stream stream = stream_of(c, i % streams);
    const int chunk = i / streams, first = chunk * rows, end = min(first + rows, rows_of(stream));
    if (first < end) use(stream, chunk, first, end);
  }
}

// One row of a stream: payload, scales, and the route entries with their places.
__device__ inline void pack_row(const Context& c, const DispatchTask& t, const Stream& stream, int token, char* to) {
  const StreamRow layout = stream_row_of(c, t);
  const auto* from = static_cast<const char*>(t.args.x) + token * t.args.x_pitch;
  if (t.args.cast != Cast::kNone) {
    cast_row(from, to, to + layout.side_offset, c.shape.hidden, t.args.cast, t.args.scale_format);
  } else {
    copy_vectors(to, from, t.args.format.payload_bytes);
    if (t.args.scales != nullptr) {
      copy_bytes(to + layout.side_offset, static_cast<const char*>(t.args.scales) + token * t.args.scales_pitch,
                 t.args.format.scale_bytes);
    }
  }
  if (t.cached || lane_idx() >= c.shape.num_topk) return;
  const int64_t entry = int64_t{token} * c.shape.num_topk + lane_idx();
  RouteEntry route{t.source.experts[entry], t.args.topk_weights != nullptr ? t.args.topk_weights[entry] : 1.0f, -1, -1};
  const int first_expert = stream.node * c.sizes.node_num_experts;
  if (route.expert >= first_expert && route.expert < first_expert + c.sizes.node_num_experts) {
    route.rank_row = t.source.slot_places[entry];
    if (c.shape.row_per_expert()) route.expert_row = t.source.expert_places[entry];
  } else {
    route.expert = -1;
  }
  reinterpret_cast<RouteEntry*>(to + layout.routes_offset)[lane_idx()] = route;
}

// D4, other nodes.
__device__ inline void d4_send_nodes(const Context& c, const DispatchTask& t) {
  const int64_t row_bytes = stream_row_of(c, t).bytes;
  const CountVector own = c.counts_at(c.local_rank(), c.team.rank);  // after own_counts_written()
  const auto rows_of = [&](const Stream& stream) {
    return t.cached ? t.source.stream_counts[stream.idx] : ptx::ld_relaxed_sys(own.node_rows + stream.node);
  };
  for_chunks(c, rows_of, [&](const Stream& stream, int chunk, int first, int end) {
    for (int row = first; row < end; ++row) {
      const int token = t.source.stream_tokens[int64_t{stream.idx} * t.args.num_tokens + row];
      pack_row(c, t, stream, token, net_out(c, stream.idx) + row * row_bytes);
    }
    __syncwarp();
    put_chunk(c, stream, chunk, first, end, row_bytes);
    if (lane_idx() == 0) {
      atomicAdd(&c.team.control->network_bytes, static_cast<unsigned long long>((end - first) * row_bytes));
    }
  });
}

// D2, as a relay: the vectors of the rail peers to the ranks of the node; a warp for each. False where the kernel has
// to be left.
__device__ inline bool d2_relay(const Context& c) {
  bool ok = true;
  for (int idx = grid_warp_idx(); idx < num_streams(c); idx += num_warps() * static_cast<int>(gridDim.x)) {
    const Stream stream = stream_of(c, idx);
    if (lane_idx() == 0) {
      uint64_t* word = c.own_word(Region::kNetCountsFlag, idx);
      ok = wait(c, word, c.epoch, Step::kD2Exchange, stream.peer);
      if (ok) acquire_put(word, c.epoch);
    }
    ok = __all_sync(kFullWarp, ok) != 0;
    __syncwarp();
    if (!ok) break;
    const char* from = c.own(Region::kNetCountsIn, c.lane) + idx * c.sizes.counts_bytes;
    for (int local = 0; local < c.num_locals(); ++local) {
      copy_vectors(c.region(local, Region::kCounts, c.lane) + stream.peer * c.sizes.counts_bytes, from,
                   c.sizes.counts_bytes);
    }
    __syncwarp();
    if (lane_idx() < c.num_locals()) {
      signal(c.team, c.word(lane_idx(), Region::kCountsFlag, c.lane, stream.peer), c.epoch);
    }
  }
  return ok;
}

// What a rail peer's dispatch has promised to this rank is waited for, by one thread for each stream; nobody uses it.
__device__ inline bool drain_streams(const Context& c) {
  const int idx = stream_of_thread(c);
  if (idx < 0) return true;
  const Stream stream = stream_of(c, idx);
  const int rows = ptx::ld_relaxed_sys(c.counts_at(c.local_rank(), stream.peer).node_rows + c.own_node());
  bool ok = true;
  for (int chunk = 0; ok && chunk * chunk_rows(c) < rows; ++chunk) {
    const int64_t word = int64_t{idx} * max_chunks(c.shape) + chunk;
    ok = wait(c, c.own_word(Region::kChunkFlag, word), Tag::word(c.epoch, 0), Step::kD5Relay, stream.peer);
  }
  return ok;
}

// One warp of a relay at work on a row.
class Relay {
 public:
  __device__ Relay(const Context& c, const DispatchTask& t, const BasesArena& bases)
      : c_(c), t_(t), bases_(bases), layout_(stream_row_of(c, t)) {}

  __device__ void row(const Stream& stream, int row) const {
    const char* from = net_in(c_, stream.idx) + row * layout_.bytes;
    const RouteEntry route = final_route(stream, row, from);
    // A lane for each rank of the node: the rank row there.
    int32_t rank_row = -1;
    for (int slot = 0; slot < c_.shape.num_topk; ++slot) {
      const int32_t expert = __shfl_sync(kFullWarp, route.expert, slot);
      const int32_t there = __shfl_sync(kFullWarp, route.rank_row, slot);
      if (expert >= 0 && c_.local_of_expert(expert) == lane_idx()) rank_row = there;
    }
    const uint32_t targets = __ballot_sync(kFullWarp, rank_row >= 0);
    if (!c_.shape.row_per_expert()) store_payload(from, rank_row, targets);
    if (!t_.cached) store_records(stream, row, route, rank_row, targets);
    count_bytes(targets);
  }

 private:
  // Of the lane's slot, with final rows; kept in the handle, or taken from there.
  __device__ RouteEntry final_route(const Stream& stream, int row, const char* from) const {
    RouteEntry route{-1, 0.0f, -1, -1};
    if (lane_idx() >= c_.shape.num_topk) return route;
    RouteEntry* kept =
        t_.relay.routes + (int64_t{stream.idx} * c_.shape.max_tokens + row) * c_.shape.num_topk + lane_idx();
    if (t_.cached) return *kept;
    route = reinterpret_cast<const RouteEntry*>(from + layout_.routes_offset)[lane_idx()];
    if (route.expert >= 0) {
      const int node_expert = route.expert - c_.sizes.node_first_expert;
      route.rank_row += bases_.relay_rank_bases[stream.idx * c_.num_locals() + c_.local_of_expert(route.expert)];
      if (c_.shape.row_per_expert()) {
        route.expert_row += bases_.relay_expert_bases[stream.idx * c_.sizes.node_num_experts + node_expert];
      }
    }
    *kept = route;
    return route;
  }

  __device__ void store_payload(const char* from, int32_t rank_row, uint32_t targets) const {
    store_to(Region::kRecvRows, t_.args.format.payload_bytes, from, t_.args.format.payload_bytes, rank_row, targets);
    store_to(Region::kRecvScales, t_.args.format.scale_pitch(), from + layout_.side_offset, t_.args.format.scale_span(),
             rank_row, targets);
  }

  __device__ void store_to(Region region, int64_t pitch, const char* from, int64_t bytes, int32_t rank_row,
                           uint32_t targets) const {
    // Lanes leave the loop over a row at different times, so what they need of each other is fetched before.
    for (uint32_t left = targets; left != 0; left &= left - 1) {
      const int local = __ffs(static_cast<int>(left)) - 1;
      const int64_t row = __shfl_sync(kFullWarp, rank_row, local);
      copy_vectors(c_.region(local, region, t_.args.slot) + row * pitch, from, bytes);
    }
  }

  __device__ void store_records(const Stream& stream, int row, const RouteEntry& route, int32_t rank_row,
                                uint32_t targets) const {
    for (uint32_t left = targets; left != 0; left &= left - 1) {
      const int local = __ffs(static_cast<int>(left)) - 1;
      const int64_t there = __shfl_sync(kFullWarp, rank_row, local);
      char* records = c_.region(local, Region::kRecvRoutes, t_.args.slot);
      const RouteRecord record = RouteRecord::at(c_.shape, records + there * c_.sizes.record_bytes);
      if (record.from_row != nullptr && lane_idx() == 0) {
        *record.from_row = PulledFrom::pack(c_, c_.local_rank(), stream.idx, row);
      }
      if (lane_idx() >= c_.shape.num_topk) continue;
      record.experts[lane_idx()] = route.expert;
      record.weights[lane_idx()] = route.weight;
      if (record.expert_rows != nullptr) record.expert_rows[lane_idx()] = route.expert < 0 ? -1 : route.expert_row;
    }
  }

  __device__ void count_bytes(uint32_t targets) const {
    const int others = __popc(targets & ~(1u << c_.local_rank()));
    if (lane_idx() != 0 || others == 0) return;
    const int64_t bytes =
        t_.args.format.payload_bytes + t_.args.format.scale_span() + (t_.cached ? 0 : c_.sizes.record_bytes);
    atomicAdd(&c_.team.control->wire_bytes, static_cast<unsigned long long>(others * bytes));
  }

  const Context& c_;
  const DispatchTask& t_;
  const BasesArena bases_;
  const StreamRow layout_;
};

// The bases that a relay needs, in a launch that has not worked them out itself: the counts still lie in the window.
__device__ inline void d3_relay_bases(const Context& c, const BasesArena& arena) {
  sum_counts(c, arena);
  __syncthreads();
  if (c.shape.row_per_expert()) start_groups(c, arena);
  ptx::fence_proxy_async();  // the arena has been written by ordinary stores, later it is by bulk loads
  __syncthreads();
}

// D5. All threads; false where the kernel has to be left.
__device__ inline bool d5_relay(const Context& c, const DispatchTask& t, const BasesArena& bases) {
  const Relay relay(c, t, bases);
  bool ok = true;
  for_chunks(
      c, [&](const Stream& stream) { return t.relay.counts[stream.idx]; },
      [&](const Stream& stream, int chunk, int first, int end) {
        if (ok && lane_idx() == 0) ok = wait_chunk(c, stream, chunk, Step::kD5Relay);
        ok = __all_sync(kFullWarp, ok) != 0;
        __syncwarp();
        for (int row = first; ok && row < end; ++row) relay.row(stream, row);
      });
  if (!all_of_block(ok)) return false;
  if (last_block(c, c.control.grid.relayed)) {
    signal_node(c, Region::kRelayedFlag, c.local_rank(), Tag::word(c.epoch, c.tag));
  }
  return true;
}

}  // namespace deep_a2a::cuda
