// The verb across nodes, for kernels: bytes to the same place in the symmetric memory of another PE, then a word there.
// Only modules that are built with DEEP_A2A_NETWORK have it (csrc/nvshmem/verbs.cu, linked in as device code).
//
// Addresses are the caller's own: `to` and `word` lie in its symmetric memory and stand for the same places at `pe`.
// `from` lies in symmetric memory too and stays as it is until the receiver has given credit.
//
// Before a put. Whoever has written the bytes has synchronised with the thread or warp that puts: __syncwarp,
// __syncthreads, or an acq_rel atomic that both have used. Bulk stores count as written once their issuer has waited
// for their group (bulk_wait, not bulk_wait_read). The put itself then fences at system scope.
//
// After a put. The word vouches for the bytes of its own put alone. Puts and signals to one PE overtake each other:
// they may take different queue pairs. No fence and no quiet is to be counted on; there is one put in flight per word.
//
// At the receiver: an acquire load of the word at system scope (wait() of sync.cuh), then flush_arrivals() by the
// thread that has acquired, then whatever lets others see it: a barrier, and a proxy fence for those who issue bulk
// loads.
//
// Sources of all this are in "Across nodes" of docs/protocol.md.
#pragma once

#include "cuda/ptx.cuh"

namespace deep_a2a::cuda {

// All lanes of a warp, with the same arguments. Where the PE's memory is mapped here the lanes copy; elsewhere one of
// them hands the work to a NIC or to a host thread. Returns at once, but for a full queue, for which NVSHMEM waits
// without a deadline.
__device__ void put_signal_warp(void* to, const void* from, int64_t bytes, uint64_t* word, uint64_t value, int pe);
// One thread. Far too slow where it has to copy by itself.
__device__ void put_signal_thread(void* to, const void* from, int64_t bytes, uint64_t* word, uint64_t value, int pe);
// A put of no bytes, by one thread: what it and those it has synchronised with have read may be overwritten, what they
// have stored by NVLink may be read.
__device__ void remote_signal(uint64_t* word, uint64_t value, int pe);

// Where GPUDirect writes reach this GPU out of order (TransportChoice::needs_flush), makes NVSHMEM bring in what came
// before `word`, which this thread has acquired. Waits without a deadline, as NVSHMEM does.
__device__ void flush_arrivals(uint64_t* word, uint64_t acquired);

// Where the memory of `pe` is mapped here: the address of the same place there, else null.
__device__ void* mapped_at(void* symmetric, int pe);

// put_signal_warp() for mapped memory, without the library, which copies 16 bytes a lane at a time and waits for each:
// here kBatch of them are under way. Whole 16 bytes; `to` and `word` from mapped_at().
__device__ inline void store_signal_warp(void* to, const void* from, int64_t bytes, uint64_t* word, uint64_t value) {
  constexpr int64_t kBatch = 8, kLanes = 32;
  const int64_t lane = static_cast<int64_t>(threadIdx.x) % kLanes, count = bytes / static_cast<int64_t>(sizeof(uint4));
  const auto* source = static_cast<const uint4*>(from);
  auto* target = static_cast<uint4*>(to);
  __syncwarp();
  int64_t at = lane;
  for (; at + (kBatch - 1) * kLanes < count; at += kBatch * kLanes) {
    uint4 batch[kBatch];
#pragma unroll
    for (int64_t i = 0; i < kBatch; ++i) batch[i] = source[at + i * kLanes];
#pragma unroll
    for (int64_t i = 0; i < kBatch; ++i) target[at + i * kLanes] = batch[i];
  }
  for (; at < count; at += kLanes) target[at] = source[at];
  __syncwarp();
  if (lane == 0) ptx::st_release_sys(word, value);  // releases what the other lanes have stored, after the barrier
  __syncwarp();
}

}  // namespace deep_a2a::cuda
