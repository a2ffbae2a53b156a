// D7: the scales of a slot, column by column. A warp takes a piece of 32 rows and a line's length of them through
// shared memory of its own: it reads whole lines of rows, and writes whole lines of columns.
#include "cuda/context.cuh"
#include "cuda/kernels.cuh"

namespace deep_a2a::cuda {
namespace {

constexpr int kLineUnits = kScaleLineBytes / static_cast<int>(sizeof(uint4));
constexpr int kUnitWords = static_cast<int>(sizeof(uint4) / sizeof(uint32_t));
constexpr int kLoads = kScalePieceRows * kLineUnits / kWarpThreads;  // of each lane, all under way at once
static_assert(kScalePieceRows == kWarpThreads, "a lane stores one row of each column");
static_assert(kScaleAlignment % kScaleLineBytes == 0, "rows of scales begin with a line, and have whole ones");

// Where in shared memory: neighbours in a row and neighbours in a column lie in different banks.
__device__ uint4& unit_at(uint4* piece, int row, int unit) {
  return piece[row * kLineUnits + (unit ^ row % kLineUnits)];
}

__device__ int64_t rows_of(const ScalesTask& t, int group) {
  const ReceivedCounts& counts = t.counts;
  const int rows = t.groups == ScaleGroups::kAll    ? counts.num_received[0]
                   : t.groups == ScaleGroups::kHeld ? counts.rows_per_expert[group]
                                                    : counts.expert_offsets[group + 1] - counts.expert_offsets[group];
  return min(int64_t{rows}, t.to.pitch);
}

__device__ void load_piece(const ScalesTask& t, uint4* piece, int64_t first_row, int num_rows, int line) {
  const int num_units = min(ceil_div<int>(t.format.scale_bytes, sizeof(uint4)) - line * kLineUnits, kLineUnits);
  const char* rows = t.rows + first_row * t.format.scale_pitch() + line * kScaleLineBytes;
  uint4 units[kLoads] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = (i * kWarpThreads + lane_idx()) / kLineUnits, unit = lane_idx() % kLineUnits;
    if (row >= num_rows || unit >= num_units) continue;
    units[i] = reinterpret_cast<const uint4*>(rows + int64_t{row} * t.format.scale_pitch())[unit];
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    unit_at(piece, (i * kWarpThreads + lane_idx()) / kLineUnits, lane_idx() % kLineUnits) = units[i];
  }
}

__device__ void store_piece(const ScalesTask& t, uint4* piece, uint32_t* to, int num_rows, int line) {
  const int num_columns = ColumnScales::num_columns(t.format), row = lane_idx();
  const uint32_t last_mask = ColumnScales::last_mask(t.format);
  int column = line * kLineUnits * kUnitWords;
  for (int unit = 0; unit < kLineUnits && column < num_columns; ++unit) {
    const uint4 four = unit_at(piece, row, unit);
    const uint32_t words[kUnitWords] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < kUnitWords; ++i, ++column) {
      if (row >= num_rows || column >= num_columns) continue;
      to[column * t.to.pitch + row] = column < num_columns - 1 ? words[i] : words[i] & last_mask;
    }
  }
}

}  // namespace

__global__ void __launch_bounds__(kScaleThreads, 1) d7_column_scales_kernel(const __grid_constant__ ScalesTask t) {
  auto* piece = reinterpret_cast<uint4*>(ptx::dynamic_shared() + warp_idx() * kScalePieceBytes);
  const auto num_lines = static_cast<unsigned>(ceil_div(t.format.scale_bytes, kScaleLineBytes));
  const auto num_groups = static_cast<unsigned>(t.num_groups);
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(t.to.pitch, kScalePieceRows));  // of rows, in a group
  const unsigned num_pieces = blocks * num_groups * num_lines;
  const auto step = static_cast<unsigned>(num_warps()) * gridDim.x;
  // Groups may hold few of the rows that they have room for: the first rows of all of them come first, so that no warp
  // gets much more than another.
  for (auto item = static_cast<unsigned>(grid_warp_idx()); item < num_pieces; item += step) {
    const auto line = static_cast<int>(item % num_lines);
    const auto group = static_cast<int>(item / num_lines % num_groups);
    const int64_t first = int64_t{item / num_lines / num_groups} * kScalePieceRows, left = rows_of(t, group) - first;
    if (left <= 0) continue;
    const int num_rows = static_cast<int>(min(left, int64_t{kScalePieceRows}));
    load_piece(t, piece, group * t.group_rows + first, num_rows, line);
    __syncwarp();
    store_piece(t, piece, t.to.words + group * ColumnScales::num_columns(t.format) * t.to.pitch + first, num_rows,
                line);
    __syncwarp();
  }
}

}  // namespace deep_a2a::cuda
