#include "cpu/doorbell.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace deep_a2a::cpu {

// The order of both sides is sequentially consistent: either the ringer sees `sleeping`, or the waiter sees the ring
// (FUTEX_WAIT compares `rings` once more in the kernel).
void Doorbell::ring() {
  __atomic_fetch_add(&rings, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST) != 0) {
    ::syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

void Doorbell::sleep(uint32_t seen_rings, int64_t timeout_ns) {
  const timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
  __atomic_store_n(&sleeping, 1, __ATOMIC_SEQ_CST);
  ::syscall(SYS_futex, &rings, FUTEX_WAIT, seen_rings, &timeout, nullptr, 0);
  __atomic_store_n(&sleeping, 0, __ATOMIC_SEQ_CST);
}

}  // namespace deep_a2a::cpu
