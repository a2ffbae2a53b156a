// Barriers of a block: __syncthreads and its relatives, and the 16 named ones.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/thread.hpp"
#include "emulator/warp.hpp"

namespace deep_a2a::emulator {

class Launch;

constexpr unsigned kMaxBlockThreads = 1024;
constexpr int kNumBlockBarriers = 16;

enum class BarrierKind : int { kSync, kAnd, kOr, kCount };

class BlockBarriers {
 public:
  BlockBarriers(Launch& launch, unsigned num_threads) : launch_(launch), num_live_(num_threads) {}

  // Called by a fiber: blocks it until all threads that have not exited have come. `site`: the place in the code, which
  // has to be the same for all lanes of a warp.
  int sync(Thread& self, BarrierKind kind, bool predicate, const void* site);
  // The same for `num_threads` threads, whichever they are.
  void sync_named(Thread& self, int barrier_idx, unsigned num_threads);
  // Returns how many threads are left.
  unsigned exit();

 private:
  struct Barrier {
    std::vector<Thread*> waiting;
    BarrierKind kind = BarrierKind::kSync;
    unsigned wanted = 0;  // 0: all threads that have not exited
    unsigned num_true = 0;
  };

  void arrive(Thread& self, Barrier& barrier, BarrierKind kind, unsigned wanted, bool predicate);
  bool complete(Barrier& barrier);

  Launch& launch_;
  unsigned num_live_;
  Barrier barriers_[kNumBlockBarriers];
  const void* sites_[kMaxBlockThreads / kWarpSize] = {};  // where each warp's lanes wait at the first
};

}  // namespace deep_a2a::emulator
