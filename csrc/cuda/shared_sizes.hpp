// What a block keeps in shared memory beside the arena.
#pragma once

#include <cstdint>

#include "cuda/task.hpp"

namespace deep_a2a::cuda {

constexpr int kMaxBarriers = 128;  // of all rings of a block

// Counts through a ring: which stage, and the parity of its barrier's phase.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  DEEP_A2A_HOST_DEVICE void advance(int num_stages) {
    if (++stage < num_stages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct BlockShared {
  uint64_t barriers[kMaxBarriers];
  RingPosition rings[kBlockWarps];       // of each warp
  int32_t rank_bases[kMaxRanksPerNode];  // where this rank's rows start at each rank of the node
  int32_t num_rows;                      // of `x`, that this rank receives
  int32_t num_rank_rows;
  int32_t bad_entry;  // the first of topk_idx that is out of range
  uint32_t refused;
  uint32_t slot_taken;  // when first looked at, a rank had not released the slot
  uint32_t last_block;
  uint32_t parts[kMaxReadyParts];  // warps that have added their rows of it
  uint32_t rounds[kMaxRounds];     // warps that have summed their tokens of it
  uint32_t pushed;                 // warps that have pushed all their rows
  uint32_t recorded;               // warps that have sent all their records
};

// A kernel's parameters, for calls: what these take by reference would else lie behind the first-level cache, which
// every acquire drops. Only with several nodes, where registers do not suffice for all steps in one function.
template <class Task>
struct CallFrame {
  Team team;
  Task task;
  uint32_t tag;
};
constexpr int kFrameBegin = align_up<int>(sizeof(BlockShared), 16);
constexpr int kFrameBytes =
    static_cast<int>(sizeof(CallFrame<DispatchTask>) > sizeof(CallFrame<CombineTask>) ? sizeof(CallFrame<DispatchTask>)
                                                                                      : sizeof(CallFrame<CombineTask>));

// The arena follows: one phase of a kernel uses it after another.
DEEP_A2A_HOST_DEVICE constexpr int arena_begin(int num_nodes) {
  return align_up<int>(num_nodes > 1 ? kFrameBegin + kFrameBytes : static_cast<int>(sizeof(BlockShared)), 128);
}

}  // namespace deep_a2a::cuda
