// Moving rows through shared memory: a warp's stages, each with room for a piece of a row and what goes along with it.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

// One warp's stages. Each lane that can be a target of a stage's item keeps there to which row it stores it, -1 for
// none.
struct Stages {
  const DispatchPlan& plan;
  char* memory;
  uint64_t* full;
  RingPosition& at;  // where the ring has come to, for whoever uses it next

  __device__ Stages(const Context& c, const DispatchPlan& the_plan)
      : plan(the_plan),
        memory(c.arena + plan.ring_offset + warp_idx() * plan.num_stages * plan.stage_bytes),
        full(c.shared.barriers + warp_idx() * plan.num_stages),
        at(c.shared.rings[warp_idx()]) {}
  __device__ char* payload(int stage) const { return memory + stage * plan.stage_bytes; }
  __device__ char* scales(int stage) const { return payload(stage) + plan.side_offset; }
  __device__ char* record(int stage) const { return payload(stage) + plan.record_offset; }
  __device__ void keep_row(int stage, int32_t row) const {
    if (lane_idx() < plan.num_targets) rows(stage)[lane_idx()] = row;
  }
  __device__ int32_t kept_row(int stage) const { return lane_idx() < plan.num_targets ? rows(stage)[lane_idx()] : -1; }
  // What another lane has kept.
  __device__ int32_t row_of(int stage, int lane) const { return rows(stage)[lane]; }

 private:
  __device__ int32_t* rows(int stage) const { return reinterpret_cast<int32_t*>(payload(stage) + plan.rows_offset); }
};

// When the stage of the item before gets its next load: behind the stores of an item, where these are all there is to
// do, or before an item is worked on, so that the load is under way meanwhile.
enum class Refill : int { kAfterStore, kBeforeWork };

// Runs one warp's items through its ring: load(item, stage) starts the loads of an item and arrives at the stage's
// barrier once, store(item, stage) issues its stores. Returns when all of them are complete.
template <class Load, class Store>
__device__ void move_items(const Stages& stages, Refill when, int first, int step, int num_items, Load&& load,
                           Store&& store) {
  const int num_stages = stages.plan.num_stages;
  RingPosition filling = stages.at, storing = filling;
  int next = first;
  const auto refill = [&] {
    if (next >= num_items) return;
    load(next, filling.stage);
    filling.advance(num_stages);
    next += step;
  };
  for (int i = 0; i < num_stages; ++i) refill();
  for (int item = first; item < num_items; item += step) {
    wait_full(stages.full + storing.stage, storing.parity);
    if (when == Refill::kBeforeWork && item != first) {
      ptx::bulk_wait_read<0>();
      __syncwarp();
      refill();
    }
    store(item, storing.stage);
    ptx::bulk_commit();
    storing.advance(num_stages);
    if (when == Refill::kAfterStore && item != first) {
      ptx::bulk_wait_read<1>();
      __syncwarp();
      refill();
    }
  }
  ptx::bulk_wait<0>();
  __syncwarp();
  stages.at = storing;
  __syncwarp();
}

// A few bytes, by a warp; 4 at a time where the source allows it.
__device__ inline void copy_bytes(char* to, const char* from, int bytes) {
  if (bytes % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    for (int i = lane_idx() * 4; i < bytes; i += kWarpThreads * 4) {
      *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from + i);
    }
  } else {
    for (int i = lane_idx(); i < bytes; i += kWarpThreads) to[i] = from[i];
  }
}

}  // namespace deep_a2a::cuda
