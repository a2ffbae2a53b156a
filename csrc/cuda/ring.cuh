// A ring of stages in shared memory that bulk loads fill, one warp's own.
#pragma once

#include "cuda/context.cuh"

namespace deep_a2a::cuda {

// Every load completes unless the GPU is broken; a peer's window stays mapped whatever becomes of the peer.
__device__ inline void wait_full(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// All threads of the block; before a barrier of the block. The fence takes a microsecond: best where the block waits.
__device__ inline void init_barriers(uint64_t* barriers, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    ptx::mbarrier_init(barriers + i, 1);
    ptx::fence_mbarrier_init();
  }
}

}  // namespace deep_a2a::cuda
