#include "emulator/intrinsics.hpp"

#include "emulator/control.hpp"
#include "emulator/launch.hpp"

__thread uint3 threadIdx;
__thread uint3 blockIdx;
__thread dim3 blockDim;
__thread dim3 gridDim;

namespace deep_a2a::emulator {

uint64_t warp_call(const WarpCall& call) {
  Thread& self = Launch::self();
  return self.warp->call(self, call);
}

int sync_block(BarrierKind kind, bool predicate, const void* site) {
  Thread& self = Launch::self();
  return self.block->barriers().sync(self, kind, predicate, site);
}

void yield_outside() { Launch::current().poll(Poll::kOutside); }
void maybe_preempt() { Launch::current().preempt(); }
void trap() { throw KernelError("__trap"); }

}  // namespace deep_a2a::emulator
