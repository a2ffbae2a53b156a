#include "emulator/block_barrier.hpp"

#include <algorithm>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"

namespace deep_a2a::emulator {
namespace {

const char* name_of(BarrierKind kind) {
  switch (kind) {
    case BarrierKind::kSync:
      return "__syncthreads";
    case BarrierKind::kAnd:
      return "__syncthreads_and";
    case BarrierKind::kOr:
      return "__syncthreads_or";
    case BarrierKind::kCount:
      return "__syncthreads_count";
  }
  return "a barrier";
}

}  // namespace

int BlockBarriers::sync(Thread& self, BarrierKind kind, bool predicate, const void* site) {
  const void*& of_warp = sites_[self.linear_idx / kWarpSize];
  if (of_warp != nullptr && of_warp != site) {
    throw KernelError(text("lanes of a warp call ", name_of(kind),
                           " in different places: it has to be the same instruction for all of them"));
  }
  of_warp = site;
  arrive(self, barriers_[0], kind, 0, predicate);
  return static_cast<int>(self.result);
}

void BlockBarriers::sync_named(Thread& self, int barrier_idx, unsigned num_threads) {
  if (barrier_idx < 0 || barrier_idx >= kNumBlockBarriers) {
    throw KernelError(text("named_barrier: id is ", barrier_idx, ", expected 0 to ", kNumBlockBarriers - 1));
  }
  if (num_threads == 0 || num_threads % kWarpSize != 0 || num_threads > kMaxBlockThreads) {
    throw KernelError(
        text("named_barrier: threads is ", num_threads, ", expected a multiple of 32 up to ", kMaxBlockThreads));
  }
  arrive(self, barriers_[barrier_idx], BarrierKind::kSync, num_threads, false);
}

void BlockBarriers::arrive(Thread& self, Barrier& barrier, BarrierKind kind, unsigned wanted, bool predicate) {
  if (!barrier.waiting.empty() && (barrier.kind != kind || barrier.wanted != wanted)) {
    throw KernelError(text("a barrier of ", wanted, " threads by ", name_of(kind), " where others wait for one of ",
                           barrier.wanted, " by ", name_of(barrier.kind), " (0: all of the block)"));
  }
  barrier.kind = kind;
  barrier.wanted = wanted;
  barrier.num_true += predicate ? 1 : 0;
  barrier.waiting.push_back(&self);
  launch_.note_progress();
  if (!complete(barrier)) launch_.block(wanted == 0 ? name_of(kind) : "ptx::named_barrier");
}

// Whether all have come, who then go on.
bool BlockBarriers::complete(Barrier& barrier) {
  const auto num_waiting = static_cast<unsigned>(barrier.waiting.size());
  if (num_waiting < (barrier.wanted == 0 ? num_live_ : barrier.wanted)) return false;
  const unsigned num_true = barrier.num_true;
  const unsigned result = barrier.kind == BarrierKind::kCount ? num_true
                          : barrier.kind == BarrierKind::kAnd ? num_true == num_waiting
                                                              : num_true != 0;
  for (Thread* thread : barrier.waiting) {
    thread->result = result;
    launch_.release(thread);
  }
  barrier.waiting.clear();
  if (&barrier == barriers_) std::fill(std::begin(sites_), std::end(sites_), nullptr);
  barrier.num_true = 0;
  return true;
}

unsigned BlockBarriers::exit() {
  --num_live_;
  for (Barrier& barrier : barriers_) {
    if (!barrier.waiting.empty() && barrier.wanted == 0) complete(barrier);
  }
  return num_live_;
}

}  // namespace deep_a2a::emulator
