// CUDA's atomics, on memory that other processes may share. Part of intrinsics.hpp. Only for the types that CUDA has.
#pragma once

#include "emulator/intrinsics.hpp"

namespace deep_a2a::emulator {

template <class T, class Change>
T change_atomically(T* address, Change&& change) {
  maybe_preempt();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, change(old), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T compare_and_swap(T* address, T expected, T value) {
  maybe_preempt();
  T old = expected;
  if (!__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) yield_outside();
  return old;
}

}  // namespace deep_a2a::emulator

#define DEEP_A2A_ATOMICS(type)                                                                                  \
  inline type atomicAdd(type* address, type value) {                                                            \
    deep_a2a::emulator::maybe_preempt();                                                                        \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                             \
  inline type atomicOr(type* address, type value) {                                                             \
    deep_a2a::emulator::maybe_preempt();                                                                        \
    return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                                             \
  inline type atomicExch(type* address, type value) {                                                           \
    deep_a2a::emulator::maybe_preempt();                                                                        \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                               \
  }                                                                                                             \
  inline type atomicMin(type* address, type value) {                                                            \
    return deep_a2a::emulator::change_atomically(address, [=](type old) { return old < value ? old : value; }); \
  }                                                                                                             \
  inline type atomicMax(type* address, type value) {                                                            \
    return deep_a2a::emulator::change_atomically(address, [=](type old) { return old > value ? old : value; }); \
  }                                                                                                             \
  inline type atomicCAS(type* address, type expected, type value) {                                             \
    return deep_a2a::emulator::compare_and_swap(address, expected, value);                                      \
  }
DEEP_A2A_ATOMICS(int)
DEEP_A2A_ATOMICS(unsigned)
DEEP_A2A_ATOMICS(unsigned long long)
#undef DEEP_A2A_ATOMICS
