// Dispatch across nodes, the source's part: rows are packed into streams and put to the rail peers (D4), count vectors
// are handed on (D2). docs/protocol.md has the steps, and the rounds.
#pragma once

#include "cuda/bases.cuh"
#include "cuda/chunk_tasks.cuh"
#include "cuda/packer.cuh"

namespace deep_a2a::cuda {

// ---- D4, other nodes ---------------------------------------------------------------------------------------------

__device__ inline int rows_of_round(const Context& c, const DispatchTask& t, int stream, int round) {
  return rows_before_round(c, t, stream, round + 1) - rows_before_round(c, t, stream, round);
}

// One lane: the last chunk that was put from the same place has been read. Every credit that is given is waited for, so
// that none is on its way when the next is given for the same word. False where the kernel has to be left.
__device__ inline bool d4_wait_room(const Context& c, const DispatchTask& t, int stream, int round, int idx) {
  const auto is_put = [&](int of_round) {
    return idx == 0 || idx * c.sizes.rows_per_chunk < rows_of_round(c, t, stream, of_round);
  };
  for (int before = round - kStagedRounds; before >= 0; before -= kStagedRounds) {
    if (is_put(before)) return wait_chunk_credit(c, stream, before, idx, Step::kD4SendNodes);
    if (!is_put(round)) return true;  // it takes no room
  }
  return true;
}

// One turn of a round that waits for its room.
__device__ inline bool d4_send_nodes_turn(const Context& c, const DispatchTask& t, int round, int turn) {
  const ChunkTasks tasks(c);
  TurnChunks chunks;
  const auto rows_of = [&](int stream, int idx) {
    return d4_wait_room(c, t, stream, round, idx) ? rows_of_round(c, t, stream, round) : -1;
  };
  if (!chunks.begin(c, tasks, round, turn, rows_of)) return false;
  Packer(c, t).run([&](Chunk& chunk) { return chunks.next(c, chunk); });
  return true;
}

// The rounds that have room at once. The warps with rings share the work.
__device__ inline void d4_send_nodes(const Context& c, const DispatchTask& t) {
  if (warp_idx() >= t.plan.move_warps) return;
  const ChunkTasks tasks(c);
  const int turns = tasks.turns(), all = turns * min(kStagedRounds, c.sizes.num_rounds);
  TurnChunks chunks;
  Packer(c, t).run([&](Chunk& chunk) {
    while (!chunks.next(c, chunk)) {
      const int turn = take_turn(c.control.grid.packed_chunks), round = turn / turns;
      if (turn >= all) return false;
      chunks.begin(c, tasks, round, turn % turns, [&](int stream, int) { return rows_of_round(c, t, stream, round); });
    }
    return true;
  });
}

// ---- D2, as a relay ----------------------------------------------------------------------------------------------

// The vectors of the rail peers to the ranks of the node; a warp for each, the last of their blocks. False where the
// kernel has to be left.
__device__ inline bool d2_relay(const Context& c) {
  bool ok = true;
  const int last = (num_warps() - 1 - warp_idx()) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  for (int idx = last; idx < num_streams(c); idx += num_warps() * static_cast<int>(gridDim.x)) {
    const Stream stream = stream_of(c, idx);
    if (lane_idx() == 0) {
      uint64_t* word = c.own_word(Region::kNetCountsFlag, idx);
      ok = wait(c, word, c.epoch, Step::kD2Exchange, stream.peer);
      if (ok) acquire_put(word, c.epoch);
    }
    ok = __all_sync(kFullWarp, ok) != 0;
    __syncwarp();
    if (!ok) break;
    const auto* from =
        reinterpret_cast<const int32_t*>(c.own(Region::kNetCountsIn, c.lane) + idx * c.sizes.counts_bytes);
    for (int i = lane_idx(); i < values_of_vector(c); i += kWarpThreads) {
      for (int local = 0; local < c.num_locals(); ++local) store_count(c, local, stream.peer, i, from[i]);
    }
  }
  return ok;
}

}  // namespace deep_a2a::cuda
