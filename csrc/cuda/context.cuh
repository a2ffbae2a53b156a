// Where a thread is: its rank's windows, its operation, its block.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/shared_sizes.hpp"
#include "cuda/team.hpp"

namespace deep_a2a::cuda {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

struct Context {
  const Team& team;
  const Shape& shape;
  const Sizes& sizes;
  LaneControl& control;
  BlockShared& shared;
  char* arena;
  const int lane;
  uint64_t epoch;
  const uint32_t tag;
  const bool per_expert;  // rows, as Shape::row_per_expert; where a kernel is made for it, known when it is compiled

  __device__ Context(const Team& the_team, int lane_idx, Half half, uint32_t the_tag, RowsPer rows_per)
      : team(the_team),
        shape(the_team.shape),
        sizes(the_team.sizes),
        control(the_team.control->lanes[lane_idx]),
        shared(*reinterpret_cast<BlockShared*>(ptx::dynamic_shared())),
        arena(ptx::dynamic_shared() + arena_begin(the_team.sizes.num_nodes)),
        lane(lane_idx),
        epoch(ptx::ld_relaxed_sys(&control.epoch) + (half == Half::kReceive ? 0 : 1)),
        tag(the_tag),
        per_expert(rows_per == RowsPer::kExpert) {}

  __device__ int local_rank() const { return sizes.local_rank; }
  __device__ int num_locals() const { return shape.topology.ranks_per_node; }
  __device__ int num_ranks() const { return shape.topology.num_ranks; }
  __device__ int own_node() const { return sizes.node; }
  // Of an expert that is counted from the first one of its node.
  __device__ int local_of(int expert_on_node) const {
    return static_cast<int>(static_cast<uint32_t>(expert_on_node) * sizes.expert_reciprocal >> 32);
  }
  __device__ int neighbour(int local) const { return sizes.first_rank + local; }
  // Of the own node, or -1.
  __device__ int local_of_expert(int expert) const {
    const auto on_node = static_cast<uint32_t>(expert - sizes.node_first_expert);
    if (on_node >= static_cast<uint32_t>(sizes.node_num_experts)) return -1;
    return local_of(static_cast<int>(on_node));
  }

  __device__ bool is_own_expert(int expert) const {
    return static_cast<uint32_t>(expert - sizes.first_expert) < static_cast<uint32_t>(sizes.num_local_experts);
  }
  // Where a value of a source's count vector lies at a rank of the node, `idx` being its index among the vector's
  // int32.
  __device__ uint64_t* count_word(int local, int source, int idx) const {
    return reinterpret_cast<uint64_t*>(region(local, Region::kCounts, lane) + source * 2 * sizes.counts_bytes) + idx;
  }

  __device__ char* region(int local, Region region, int instance) const {
    return team.windows[local] + team.layout.offset(region, instance);
  }
  __device__ char* own(Region which, int instance) const { return region(local_rank(), which, instance); }
  // The route record of a rank row at a rank of the node. Where rows are per expert it is sent before bases are known,
  // and found by source and place.
  __device__ char* record(int local, int64_t rank_row) const {
    return region(local, Region::kRecvRoutes, lane) + rank_row * sizes.record_bytes;
  }
  __device__ char* record_of_source(int local, int source, int32_t place) const {
    return record(local, int64_t{source} * shape.max_tokens + place);
  }
  __device__ uint64_t* word(int local, Region which, int instance, int64_t idx) const {
    return reinterpret_cast<uint64_t*>(region(local, which, instance)) + idx;
  }
  __device__ uint64_t* own_word(Region which, int64_t idx) const { return word(local_rank(), which, lane, idx); }
};

__device__ inline int warp_idx() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
__device__ inline int lane_idx() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ inline int num_warps() { return static_cast<int>(blockDim.x) / kWarpThreads; }
// Of the grid, or those that are number `first_warp` of their block or behind it.
__device__ inline int all_warps(int first_warp = 0) { return (num_warps() - first_warp) * static_cast<int>(gridDim.x); }
__device__ inline uint32_t lanes_below() { return (1u << lane_idx()) - 1u; }
// The number of a warp among them, such that neighbours are on different SMs.
__device__ inline int grid_warp_idx(int first_warp = 0) {
  return (warp_idx() - first_warp) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
}

}  // namespace deep_a2a::cuda
