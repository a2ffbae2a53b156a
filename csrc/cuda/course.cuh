// How a kernel begins and ends.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class Course : int {
  kGoOn,
  kRefused,  // by all ranks alike: the buffer stays usable
  kAborted   // this rank or another gave up
};

// All threads. Peers that have to say who is late see that this rank has come.
__device__ inline void begin(const Context& c, Half half) {
  init_barriers(c.shared.barriers, kMaxBarriers);
  if (lane_idx() == 0) c.shared.rings[warp_idx()] = {};
  for (int i = threadIdx.x; i < kMaxReadyParts; i += blockDim.x) c.shared.parts[i] = 0;
  for (int i = threadIdx.x; num_streams(c) > 0 && i < c.shape.num_rounds(); i += blockDim.x) c.shared.rounds[i] = 0;
  if (threadIdx.x == 0) c.shared.refused = c.shared.slot_taken = c.shared.pushed = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0 && half != Half::kReceive) *c.own_word(Region::kProgress, 0) = c.epoch;
  __syncthreads();
}

// One thread, once for each operation: its rows that go to other ranks, or come from them. Lanes count together.
__device__ inline void count_wire_bytes(const Context& c, const SourceHandle& source, int64_t row_bytes) {
  int64_t rows = 0;
  for (int local = 0; local < c.num_locals(); ++local) rows += local != c.local_rank() ? source.rank_rows[local] : 0;
  atomicAdd(&c.team.control->wire_bytes, static_cast<unsigned long long>(rows * row_bytes));
}

// The last block: the lane is ready for the next launch. Nobody else looks at its memory any more.
__device__ inline void end(const Context& c) {
  __syncthreads();
  auto* counters = reinterpret_cast<uint32_t*>(&c.control.grid);
  for (unsigned i = threadIdx.x; i < sizeof(c.control.grid) / sizeof(*counters); i += blockDim.x) counters[i] = 0;
  if (threadIdx.x == 0) c.control.epoch = c.epoch;
}

}  // namespace deep_a2a::cuda
