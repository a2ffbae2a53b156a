// What one launch is to do, as plain data.
#pragma once

#include <cstdint>

#include "cuda/team.hpp"
#include "cuda/tuning.hpp"

namespace deep_a2a::cuda {

// What a receiver keeps in its handle and what it gives to the caller, who may change it. In layout kRank a handle has
// no routing: that comes with the rows of every dispatch.
struct ReceivedArrays {
  int32_t* counts = nullptr;   // ReceivedCounts
  int32_t* routing = nullptr;  // ReceivedRouting of `capacity` rank rows
  int64_t capacity = 0;
};

struct DispatchTask {
  DispatchArgs args;
  int lane = 0;
  Half half = Half::kBoth;
  bool cached = false;
  uint64_t ticket = 0;  // what the host waits for in CountReport
  SourceHandle source;
  RelayHandle relay;
  ReceivedArrays kept;
  ReceivedArrays result;
  int32_t* block_counts = nullptr;  // scratch: [blocks, BlockCounts::words]
  DispatchPlan plan;
};

struct CombineTask {
  CombineArgs args;
  int lane = 0;
  Half half = Half::kBoth;
  int num_tokens = 0;
  SourceHandle source;
  RelayHandle relay;
  ReceivedArrays kept;
  CombinePlan plan;
};

}  // namespace deep_a2a::cuda
