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
  // Between nodes, in the place of these rows: what the stage's item is.
  template <class Item>
  __device__ Item& item(int stage) const {
    static_assert(sizeof(Item) <= kMaxItemBytes);
    return *reinterpret_cast<Item*>(payload(stage) + plan.rows_offset);
  }
  // What another lane has kept.
  __device__ int32_t row_of(int stage, int lane) const { return rows(stage)[lane]; }

 private:
  __device__ int32_t* rows(int stage) const { return reinterpret_cast<int32_t*>(payload(stage) + plan.rows_offset); }
};

// How many items have been stored when the stage of the first of them is loaded again. Where an item is worked on, at
// once: the work of the next one hides the load. Where stores are all there is to do, one later: they are then behind
// each other without a gap.
enum class Refill : int { kAtOnce = 1, kOneLater = 2 };

// Runs one warp's items through its ring. load(stage, waits) starts the loads of the next item and arrives at the
// stage's barrier once; false where there is no item, or, unless it `waits`, not yet. store(stage) issues the stores of
// the item that was loaded first. Returns when there are no more items and all stores are complete.
template <class Load, class Store>
__device__ void move_items(const Stages& stages, Refill refill, Load&& load, Store&& store) {
  const int num_stages = stages.plan.num_stages;
  RingPosition filling = stages.at, storing = filling;
  int room = num_stages, loaded = 0, unread = 0;
  while (true) {
#pragma unroll 1
    while (room > 0 && load(filling.stage, loaded == 0)) {
      filling.advance(num_stages);
      --room;
      ++loaded;
    }
    if (loaded == 0) break;
    wait_full(stages.full + storing.stage, storing.parity);
    store(storing.stage);
    ptx::bulk_commit();
    storing.advance(num_stages);
    --loaded;
    if (++unread < static_cast<int>(refill)) continue;
    if (refill == Refill::kAtOnce) {
      ptx::bulk_wait_read<0>();
    } else {
      ptx::bulk_wait_read<1>();
    }
    __syncwarp();
    --unread;
    ++room;
  }
  ptx::bulk_wait<0>();
  __syncwarp();
  stages.at = storing;
  __syncwarp();
}

// The same for the items `first`, `first + step` and so on below `end`: load(item, stage), store(item, stage).
template <class Load, class Store>
__device__ void move_every(const Stages& stages, Refill refill, int first, int step, int end, Load&& load,
                           Store&& store) {
  int loading = first, storing = first;
  move_items(
      stages, refill,
      [&](int stage, bool) {
        if (loading >= end) return false;
        load(loading, stage);
        loading += step;
        return true;
      },
      [&](int stage) {
        store(storing, stage);
        storing += step;
      });
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
