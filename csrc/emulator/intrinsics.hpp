// CUDA's built-in variables and functions, for code that runs on a fiber.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/block_barrier.hpp"
#include "emulator/device_types.hpp"
#include "emulator/warp.hpp"

// Set whenever a fiber goes on; a kernel stays on one OS thread.
extern __thread uint3 threadIdx;
extern __thread uint3 blockIdx;
extern __thread dim3 blockDim;
extern __thread dim3 gridDim;

namespace deep_a2a::emulator {

// For the running fiber.
uint64_t warp_call(const WarpCall& call);
int sync_block(BarrierKind kind, bool predicate, const void* site);
void yield_outside();
void maybe_preempt();
[[noreturn]] void trap();

// Shuffles and matches take 4 or 8 bytes; shorter types are promoted.
template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the warp functions take values of 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
auto shuffle(WarpOperation operation, unsigned mask, T value, int operand, int width) {
  using Promoted = decltype(+value);
  return from_word<Promoted>(warp_call({operation, mask, to_word<Promoted>(value), operand, width}));
}

// Distances beyond the warp are all alike.
inline int distance(unsigned delta) { return delta < 32 ? static_cast<int>(delta) : 32; }

template <class To, class From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  return from_word<To>(to_word(value));
}

}  // namespace deep_a2a::emulator

// A label tells one call from another: unlike a return address, it is the same in all copies that a compiler makes of
// the code around the call.
#define DEEP_A2A_INLINE __attribute__((always_inline)) inline
DEEP_A2A_INLINE void __syncthreads() {
site:
  deep_a2a::emulator::sync_block(deep_a2a::emulator::BarrierKind::kSync, false, &&site);
}
DEEP_A2A_INLINE int __syncthreads_and(int predicate) {
site:
  return deep_a2a::emulator::sync_block(deep_a2a::emulator::BarrierKind::kAnd, predicate != 0, &&site);
}
DEEP_A2A_INLINE int __syncthreads_or(int predicate) {
site:
  return deep_a2a::emulator::sync_block(deep_a2a::emulator::BarrierKind::kOr, predicate != 0, &&site);
}
DEEP_A2A_INLINE int __syncthreads_count(int predicate) {
site:
  return deep_a2a::emulator::sync_block(deep_a2a::emulator::BarrierKind::kCount, predicate != 0, &&site);
}
#undef DEEP_A2A_INLINE

inline void __syncwarp(unsigned mask = ~0u) {
  deep_a2a::emulator::warp_call({deep_a2a::emulator::WarpOperation::kSync, mask});
}
template <class T>
auto __shfl_sync(unsigned mask, T value, int source_lane, int width = 32) {
  return deep_a2a::emulator::shuffle(deep_a2a::emulator::WarpOperation::kShuffle, mask, value, source_lane, width);
}
template <class T>
auto __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return deep_a2a::emulator::shuffle(deep_a2a::emulator::WarpOperation::kShuffleUp, mask, value,
                                     deep_a2a::emulator::distance(delta), width);
}
template <class T>
auto __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return deep_a2a::emulator::shuffle(deep_a2a::emulator::WarpOperation::kShuffleDown, mask, value,
                                     deep_a2a::emulator::distance(delta), width);
}
template <class T>
auto __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return deep_a2a::emulator::shuffle(deep_a2a::emulator::WarpOperation::kShuffleXor, mask, value, lane_mask & 31,
                                     width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      deep_a2a::emulator::warp_call({deep_a2a::emulator::WarpOperation::kBallot, mask, predicate != 0}));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(
      deep_a2a::emulator::warp_call({deep_a2a::emulator::WarpOperation::kAny, mask, predicate != 0}));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(
      deep_a2a::emulator::warp_call({deep_a2a::emulator::WarpOperation::kAll, mask, predicate != 0}));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(deep_a2a::emulator::warp_call(
      {deep_a2a::emulator::WarpOperation::kMatchAny, mask, deep_a2a::emulator::to_word(value)}));
}

#define DEEP_A2A_WARP_REDUCTION(name, type, operation)                                              \
  inline type name(unsigned mask, type value) {                                                     \
    return static_cast<type>(deep_a2a::emulator::warp_call(                                         \
        {deep_a2a::emulator::WarpOperation::operation, mask, deep_a2a::emulator::to_word(value)})); \
  }
DEEP_A2A_WARP_REDUCTION(__reduce_add_sync, unsigned, kReduceAdd)
DEEP_A2A_WARP_REDUCTION(__reduce_add_sync, int, kReduceAdd)
DEEP_A2A_WARP_REDUCTION(__reduce_max_sync, unsigned, kReduceMaxUnsigned)
DEEP_A2A_WARP_REDUCTION(__reduce_max_sync, int, kReduceMaxSigned)
DEEP_A2A_WARP_REDUCTION(__reduce_min_sync, unsigned, kReduceMinUnsigned)
DEEP_A2A_WARP_REDUCTION(__reduce_min_sync, int, kReduceMinSigned)
DEEP_A2A_WARP_REDUCTION(__reduce_or_sync, unsigned, kReduceOr)
DEEP_A2A_WARP_REDUCTION(__reduce_and_sync, unsigned, kReduceAnd)
#undef DEEP_A2A_WARP_REDUCTION

inline void __nanosleep(unsigned) { deep_a2a::emulator::yield_outside(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { deep_a2a::emulator::trap(); }

#include "emulator/arithmetic.hpp"
#include "emulator/atomics.hpp"
