// How the chunks of a round are handed out to warps, as these come.
#pragma once

#include "cuda/streams.cuh"

namespace deep_a2a::cuda {

// How the chunks of a round are handed out: some at a time where there are many, most of which have no rows.
struct ChunkTasks {
  int all;       // of a round
  int together;  // that a warp takes at a time

  __device__ explicit ChunkTasks(const Context& c) : all(num_streams(c) * c.sizes.chunks_per_round) {
    const int warps = num_warps() * static_cast<int>(gridDim.x);
    together = max(1, min(kWarpThreads, all / (4 * warps)));
  }
  __device__ int turns() const { return (all + together - 1) / together; }
};

// The next of a number of turns, which warps take as they come.
__device__ inline int take_turn(uint32_t& turns_taken) {
  uint32_t turn = 0;
  if (lane_idx() == 0) turn = atomicAdd(&turns_taken, 1u);
  return static_cast<int>(__shfl_sync(kFullWarp, turn, 0));
}

// The chunks of a turn that are put: those with rows, and with several rounds the first of each stream.
class TurnChunks {
 public:
  // `rows_of(stream, idx)` is asked by a lane for each chunk there can be: the rows of the round. Where it is negative
  // the kernel has to be left, as where this is false.
  template <class RowsOf>
  __device__ bool begin(const Context& c, const ChunkTasks& tasks, int round, int turn, RowsOf&& rows_of) {
    first_task_ = turn * tasks.together;
    round_ = round;
    const int task = first_task_ + lane_idx(), idx = task / num_streams(c);
    const bool exists = lane_idx() < tasks.together && task < tasks.all;
    rows_ = exists ? rows_of(task % num_streams(c), idx) : 0;
    if (__any_sync(kFullWarp, rows_ < 0)) return false;
    __syncwarp();  // what a lane has acquired is the warp's
    const bool has_rows = idx * c.sizes.rows_per_chunk < rows_;
    left_ = __ballot_sync(kFullWarp, exists && (has_rows || (idx == 0 && c.sizes.num_rounds > 1)));
    return true;
  }

  __device__ bool next(const Context& c, Chunk& chunk) {
    if (left_ == 0) return false;
    const int lane = __ffs(static_cast<int>(left_)) - 1, task = first_task_ + lane;
    left_ &= left_ - 1;
    chunk = {task % num_streams(c), round_, task / num_streams(c), __shfl_sync(kFullWarp, rows_, lane)};
    return true;
  }

 private:
  int first_task_ = 0;
  int round_ = 0;
  int rows_ = 0;  // by lane
  uint32_t left_ = 0;
};

}  // namespace deep_a2a::cuda
