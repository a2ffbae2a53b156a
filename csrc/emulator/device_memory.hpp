// What cuda/ptx.cuh needs of the emulator, for the running fiber.
#pragma once

#include <cstdint>

#include "emulator/intrinsics.hpp"

namespace deep_a2a::emulator {

char* dynamic_shared();
// Throws KernelError for a pointer that is not into the block's dynamic shared memory.
uint32_t shared_offset(const void* pointer);

// Lets others run: always where the thread loads the same address again, else at times.
void before_relaxed_load(const void* address);

template <class T>
T load_relaxed(const T* address) {
  before_relaxed_load(address);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
// False at times though the phase is over, as on hardware.
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity);

void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* to_global, const void* from_shared, uint32_t bytes);
void bulk_commit();
void bulk_wait_read(int num_pending);
void bulk_wait(int num_pending);

// They come at once, or when they are waited for, in random order.
void async_load(void* to_shared, const void* from_global, uint32_t bytes);
void async_wait();

void sync_named(int barrier_idx, unsigned num_threads);
uint64_t global_timer();

}  // namespace deep_a2a::emulator
