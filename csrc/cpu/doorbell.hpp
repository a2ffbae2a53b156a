// How a waiting lane sleeps, and how whoever signals it wakes it: a futex in the waiter's window.
#pragma once

#include <cstdint>

namespace deep_a2a::cpu {

inline uint64_t load_acquire(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline void store_release(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

// Lives in shared memory. One waiter (the lane's thread), any number of ringers.
struct Doorbell {
  uint32_t rings;
  uint32_t sleeping;

  // After the word that the waiter looks at was set.
  void ring();
  // Sleeps until rung after `seen_rings` was read, or for `timeout_ns`. Spurious returns are fine.
  void sleep(uint32_t seen_rings, int64_t timeout_ns);

  uint32_t read() const { return __atomic_load_n(&rings, __ATOMIC_SEQ_CST); }
};
static_assert(sizeof(Doorbell) == 8);

}  // namespace deep_a2a::cpu
