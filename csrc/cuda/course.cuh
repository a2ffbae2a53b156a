// How a kernel begins and ends.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class Course : int {
  kGoOn,
  kDone,     // by this block: another does what is left
  kRefused,  // by all ranks alike: the buffer stays usable
  kAborted   // this rank or another gave up
};

// ---- calls ---------------------------------------------------------------------------------------------------------

#define DEEP_A2A_CALL [[maybe_unused]] static __device__ __attribute__((noinline))

template <class Task>
__device__ inline CallFrame<Task>& call_frame() {
  return *reinterpret_cast<CallFrame<Task>*>(ptx::dynamic_shared() + kFrameBegin);
}

// All threads, before a barrier of the block. Calls begin with context_of_call().
template <class Task>
__device__ inline void keep_for_calls(const Context& c, const Task& t) {
  const auto copy = [](auto& to, const auto& from) {
    static_assert(sizeof(to) == sizeof(from) && sizeof(to) % sizeof(uint32_t) == 0);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < sizeof(to) / sizeof(uint32_t); i += blockDim.x) {
      reinterpret_cast<uint32_t*>(&to)[i] = reinterpret_cast<const uint32_t*>(&from)[i];
    }
  };
  CallFrame<Task>& frame = call_frame<Task>();
  copy(frame.team, c.team);
  copy(frame.task, t);
  if (threadIdx.x == 0) frame.tag = c.tag;
}

template <class Task>
__device__ inline Context context_of_call(const CallFrame<Task>& frame) {
  return Context(frame.team, frame.task.lane, frame.task.half, frame.tag, rows_per(frame.team.shape));
}

// ---- begin and end
// ---------------------------------------------------------------------------------------------------

// All threads.
template <class Task>
__device__ inline void begin(const Context& c, const Task& t) {
  for (int i = threadIdx.x; i < kMaxReadyParts; i += blockDim.x) c.shared.parts[i] = 0;
  for (int i = threadIdx.x; num_streams(c) > 0 && i < c.sizes.num_rounds; i += blockDim.x) c.shared.rounds[i] = 0;
  if (num_streams(c) > 0) keep_for_calls(c, t);
  if (threadIdx.x == 0) c.shared.refused = c.shared.slot_taken = c.shared.pushed = c.shared.recorded = 0;
  __syncthreads();
}

// One thread, once for each operation: its rows that go to other ranks, or come from them. Lanes count together.
__device__ inline void count_wire_bytes(const Context& c, const SourceHandle& source, int64_t row_bytes) {
  int64_t rows = 0;
#pragma unroll 1
  for (int local = 0; local < c.num_locals(); ++local) rows += local != c.local_rank() ? source.rank_rows[local] : 0;
  atomicAdd(&c.team.control->wire_bytes, static_cast<unsigned long long>(rows * row_bytes));
}

// The last block: the lane is ready for the next launch. Nobody else looks at its memory any more; the words that this
// block may still wait for are in the window.
__device__ inline void end(const Context& c) {
  auto* counters = reinterpret_cast<uint32_t*>(&c.control.grid);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < sizeof(c.control.grid) / sizeof(*counters); i += blockDim.x) counters[i] = 0;
  if (threadIdx.x == 0) c.control.epoch = c.epoch;
}

}  // namespace deep_a2a::cuda
