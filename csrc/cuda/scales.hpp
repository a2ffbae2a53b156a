// What the kernel that lays scales out by column is to do, as plain data.
#pragma once

#include "cuda/team.hpp"
#include "protocol/column_scales.hpp"

namespace deep_a2a::cuda {

constexpr int kScaleThreads = 512;             // of a block
constexpr int kScalePieceRows = kWarpThreads;  // that a warp takes at a time
constexpr int kScaleLineBytes = 128;           // and of each row
constexpr int kScalePieceBytes = kScalePieceRows * kScaleLineBytes;

enum class ScaleGroups : int {
  kAll,   // all rows are one group
  kHeld,  // a group for each expert: the rows that hold something
  kWhole  // a group for each expert, with its padding
};

struct ScalesTask {
  ScaleGroups groups = ScaleGroups::kAll;
  int32_t num_groups = 1;
  int64_t group_rows = 0;  // from one group's first row to the next one's
  const char* rows = nullptr;
  RowFormat format;
  ReceivedCounts counts;  // how many rows there are, as the GPU knows them: none of a dispatch that was refused or lost
  ColumnScales to;

  static ScalesTask of(const Shape& s, const DispatchArgs& args, int32_t* counts, const char* rows,
                       const ColumnScales& to) {
    ScalesTask task;
    task.rows = rows;
    task.format = args.format;
    task.counts = ReceivedCounts::at(s, counts);
    task.to = to;
    if (s.layout != Layout::kPadded) return task;
    task.groups = args.zero_padding ? ScaleGroups::kWhole : ScaleGroups::kHeld;
    task.num_groups = s.num_local_experts();
    task.group_rows = s.expert_capacity;
    return task;
  }
};

}  // namespace deep_a2a::cuda
