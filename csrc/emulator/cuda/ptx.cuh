// Stands in for csrc/cuda/ptx.cuh: the same functions with the same meaning, on the CPU. Fences between proxies do
// nothing.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "emulator/device_memory.hpp"
#include "protocol/numerics.hpp"

namespace deep_a2a::cuda::ptx {

inline char* dynamic_shared() { return emulator::dynamic_shared(); }
inline uint32_t shared_address(const void* pointer) { return emulator::shared_offset(pointer); }

// Whoever looks at a word waits for somebody, so others may run first.
inline uint64_t ld_acquire_sys(const uint64_t* word) {
  emulator::yield_outside();
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline uint32_t ld_acquire_gpu(const uint32_t* word) {
  emulator::yield_outside();
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline uint64_t ld_relaxed_sys(const uint64_t* word) {
  emulator::yield_outside();
  return emulator::load_relaxed(word);
}
inline int32_t ld_relaxed_sys(const int32_t* address) { return emulator::load_relaxed(address); }
inline float ld_relaxed_sys(const float* address) {
  return bits_float(emulator::load_relaxed(reinterpret_cast<const uint32_t*>(address)));
}
inline void st_relaxed_sys(uint64_t* word, uint64_t value) {
  emulator::maybe_preempt();
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
inline void st_release_sys(uint64_t* word, uint64_t value) {
  emulator::maybe_preempt();
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint32_t atom_add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  emulator::maybe_preempt();
  return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}
inline uint32_t atom_add_acq_rel_cta(uint32_t* word, uint32_t value) { return atom_add_acq_rel_gpu(word, value); }
inline uint32_t atom_exch_acq_rel_gpu(uint32_t* word, uint32_t value) {
  emulator::maybe_preempt();
  return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}
inline uint4 ld_once(const void* address) { return *static_cast<const uint4*>(address); }
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline void fence_proxy_async_shared() {}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_arrive_expect(barrier, bytes);
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return emulator::mbarrier_try_wait(barrier, parity);
}

inline void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_load(to_shared, from_global, bytes, barrier);
}
inline void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
  emulator::bulk_store(to_global, from_shared, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int kPending>
void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}
template <int kPending>
void bulk_wait() {
  emulator::bulk_wait(kPending);
}

template <int kBytes>
void async_load(void* to_shared, const void* from_global) {
  static_assert(kBytes == 4 || kBytes == 16);
  emulator::async_load(to_shared, from_global, kBytes);
}
inline void async_wait() { emulator::async_wait(); }

inline void named_barrier(int id, unsigned threads) { emulator::sync_named(id, threads); }

inline uint32_t float2_to_bf16x2(float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline uint16_t float2_to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(float_to_fp8<E4M3>(low) | float_to_fp8<E4M3>(high) << 8);
}
inline uint16_t float2_to_e5m2x2(float low, float high) {
  return static_cast<uint16_t>(float_to_fp8<E5M2>(low) | float_to_fp8<E5M2>(high) << 8);
}

inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  const auto larger = [&](int shift) {
    const float from_a = bits_float(a >> shift << 16), from_b = bits_float(b >> shift << 16);
    const bool take_b = std::isnan(from_a) || from_b > from_a;
    return ((take_b ? b : a) >> shift & 0xFFFFu) << shift;
  };
  return larger(0) | larger(16);
}

inline uint64_t global_timer() { return emulator::global_timer(); }

}  // namespace deep_a2a::cuda::ptx
