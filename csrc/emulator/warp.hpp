// The 32 threads of a warp and their collective operations.
#pragma once

#include <cstdint>

#include "emulator/thread.hpp"

namespace deep_a2a::emulator {

constexpr int kWarpSize = 32;

enum class WarpOperation : int {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kReduceAdd,
  kReduceOr,
  kReduceAnd,
  kReduceMaxSigned,
  kReduceMaxUnsigned,
  kReduceMinSigned,
  kReduceMinUnsigned
};

// What one thread brings.
struct WarpCall {
  WarpOperation operation;
  uint32_t mask;
  uint64_t value = 0;
  int operand = 0;  // source lane, distance or lane mask of a shuffle
  int width = kWarpSize;
};

class Warp {
 public:
  void add(Thread* thread);
  // Called by a fiber: blocks it until all threads of its mask that have not exited have made the same call.
  uint64_t call(Thread& self, const WarpCall& call);
  void exit(const Thread& thread);

  uint64_t stalled_until = 0;  // the sweep of the scheduler

 private:
  void check(const Thread& self, const WarpCall& call) const;
  bool alike(const WarpCall& call, uint32_t lanes) const;
  bool complete(const WarpCall& call);
  uint64_t result(int lane, uint32_t members) const;
  uint64_t shuffled(int lane, uint32_t members) const;

  Thread* lanes_[kWarpSize] = {};
  WarpCall calls_[kWarpSize] = {};
  uint32_t present_ = 0;  // and not exited
  uint32_t waiting_ = 0;
  // What the threads that came last have called, one after another, and which they are.
  uint32_t last_mask_ = 0;
  WarpOperation last_operation_ = WarpOperation::kSync;
  uint32_t last_group_ = 0;
};

}  // namespace deep_a2a::emulator
