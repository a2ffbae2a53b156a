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
  // By the warp itself, before its first item. The fence takes a microsecond: best where the block waits.
  __device__ void begin() const {
    if (lane_idx() == 0) at = {};
    if (lane_idx() < plan.num_stages) {
      ptx::mbarrier_init(full + lane_idx(), 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }
  __device__ char* payload(int stage) const { return memory + stage * plan.stage_bytes; }
  __device__ char* scales(int stage) const { return payload(stage) + plan.side_offset; }
  __device__ char* routes(int stage) const { return payload(stage) + plan.routes_offset; }
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

// Runs one warp's items through its ring. load(stage, waits) starts the loads of the next item and arrives at the
// stage's barrier once; false where there is no item, or, unless it `waits`, not yet. store(stage) issues the stores of
// the item that was loaded first. A stage is loaded again when the item behind it has been stored, too, so that the
// stores of two items follow each other without a gap. Returns when there are no more items and all stores are
// complete.
template <class Load, class Store>
__device__ void move_items(const Stages& stages, Load&& load, Store&& store) {
  const int num_stages = stages.plan.num_stages;
  RingPosition filling = stages.at, storing = filling;
  int room = num_stages, loaded = 0;
  bool is_read_later = false;
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
    if (is_read_later) {
      ptx::bulk_wait_read<1>();
      __syncwarp();
      ++room;
    }
    is_read_later = true;
  }
  ptx::bulk_wait<0>();
  __syncwarp();
  stages.at = storing;
  __syncwarp();
}

constexpr int kFixedRows = 2;  // of a warp that moves rows

// Rows that warps take as they come, since some SMs are faster than others. The first few of each warp are fixed, so
// that few rows are divided evenly; from then on the row after the next is asked of a counter of the grid.
class RowTasks {
 public:
  __device__ RowTasks(uint32_t& taken, int warps, int end, int fixed_of_warp)
      : taken_(taken),
        step_(warps * static_cast<int>(gridDim.x)),
        fixed_(fixed_of_warp * step_),
        end_(end),
        row_(warp_idx() < warps ? grid_warp_idx() : end),
        next_(row_ + step_) {}
  __device__ int row() const { return row_; }
  __device__ bool is_over() const { return row_ >= end_; }
  __device__ void advance() {
    row_ = __shfl_sync(kFullWarp, next_, 0);
    if (is_over() || lane_idx() != 0) return;
    next_ = row_ < fixed_ - step_ ? row_ + step_ : fixed_ + static_cast<int>(atomicAdd(&taken_, 1u));
  }

 private:
  uint32_t& taken_;
  const int step_;
  const int fixed_;
  const int end_;
  int row_;
  int next_;  // known to the first lane
};

// Runs the rows of `tasks` through a warp's ring, each in `plan.num_chunks` pieces: load(item, row, chunk, stage),
// store(chunk, stage). item = fetch(row) is called a row ahead, so that what it loads is there by then; a row behind
// the last is none.
template <class Fetch, class Load, class Store>
__device__ void move_rows(const Stages& stages, RowTasks& tasks, Fetch&& fetch, Load&& load, Store&& store) {
  const int num_chunks = stages.plan.num_chunks;
  int row = 0, loading = 0, storing = 0;
  auto next = fetch(tasks.row()), item = next;
  move_items(
      stages,
      [&](int stage, bool) {
        if (loading == 0) {
          if (tasks.is_over()) return false;
          row = tasks.row();
          item = next;
        }
        load(item, row, loading, stage);
        if (loading == 0) {
          tasks.advance();
          next = fetch(tasks.row());
        }
        if (++loading == num_chunks) loading = 0;
        return true;
      },
      [&](int stage) {
        store(storing, stage);
        if (++storing == num_chunks) storing = 0;
      });
}

// A few bytes to a multiple of 16 in shared memory, by a warp, whose lanes have all of them after an async_wait() each
// and a __syncwarp(); 16 or 4 at a time where the source allows it.
__device__ inline void load_bytes(char* to, const char* from, int bytes) {
  const auto alignment = reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
  if (alignment % 16 == 0) {
    for (int i = lane_idx() * 16; i < bytes; i += kWarpThreads * 16) ptx::async_load<16>(to + i, from + i);
  } else if (alignment % 4 == 0) {
    for (int i = lane_idx() * 4; i < bytes; i += kWarpThreads * 4) ptx::async_load<4>(to + i, from + i);
  } else {
    for (int i = lane_idx(); i < bytes; i += kWarpThreads) to[i] = from[i];
  }
}

}  // namespace deep_a2a::cuda
