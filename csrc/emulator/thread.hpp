// One CUDA thread: a fiber, and what it waits for.
#pragma once

#include <cstdint>
#include <list>
#include <vector>

#include "emulator/context.hpp"
#include "emulator/device_types.hpp"

namespace deep_a2a::emulator {

class Block;
class Warp;

enum class ThreadState : int { kReady, kBlocked, kWatching, kDone };

// Bulk stores that are committed together; counts of copies.
struct BulkGroup {
  uint64_t number = 0;  // of the groups of its thread, from 1
  int unread = 0;
  int unwritten = 0;
};

// A thread's groups, the oldest first, without those that are complete.
struct BulkGroups {
  std::list<BulkGroup> groups;
  BulkGroup* open = nullptr;  // the last one, where it is not committed yet
  uint64_t num_committed = 0;
  uint64_t num_waited = 0;  // known to the thread to be complete
  uint64_t last_used = 0;   // number of the last group with copies
};

// A few bytes to shared memory that have not been waited for.
struct AsyncLoad {
  void* to;
  const void* from;
  uint32_t bytes;
  bool is_there;
};

struct Thread {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 idx{};
  unsigned linear_idx = 0;  // in the block
  int lane = 0;
  ThreadState state = ThreadState::kReady;
  const char* waits_for = nullptr;  // while blocked
  uint64_t result = 0;              // of a collective operation that others have completed
  BulkGroups stores;
  std::vector<AsyncLoad> async_loads;
  const void* last_loaded = nullptr;  // by a relaxed load
};

}  // namespace deep_a2a::emulator
