// Functions of their own rather than inline ones: NVSHMEM's headers cost seconds for every file that includes them, and
// a call costs nothing beside a put.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/network.cuh"

namespace deep_a2a::cuda {

// The library itself fences for the GPU alone, by the one lane that submits the work: enough for what that lane has
// stored.
__device__ void put_signal_warp(void* to, const void* from, int64_t bytes, uint64_t* word, uint64_t value, int pe) {
  ptx::fence_acq_rel_sys();
  nvshmemx_putmem_signal_nbi_warp(to, from, static_cast<size_t>(bytes), word, value, NVSHMEM_SIGNAL_SET, pe);
}

__device__ void put_signal_thread(void* to, const void* from, int64_t bytes, uint64_t* word, uint64_t value, int pe) {
  ptx::fence_acq_rel_sys();
  nvshmem_putmem_signal_nbi(to, from, static_cast<size_t>(bytes), word, value, NVSHMEM_SIGNAL_SET, pe);
}

// Not a put of zero bytes: the library's path for puts decides about a fence by the place of a source that is not
// there.
__device__ void remote_signal(uint64_t* word, uint64_t value, int pe) {
  ptx::fence_acq_rel_sys();
  nvshmemx_signal_op(word, value, NVSHMEM_SIGNAL_SET, pe);
}

// The wait has been over before it begins; what counts is what the library does after it.
__device__ void flush_arrivals(uint64_t* word, uint64_t acquired) {
  nvshmem_uint64_wait_until(word, NVSHMEM_CMP_GE, acquired);
}

__device__ void* mapped_at(void* symmetric, int pe) { return nvshmem_ptr(symmetric, pe); }

}  // namespace deep_a2a::cuda
