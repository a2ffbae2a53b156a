// D5 as a whole: the relays' turns, round by round, and what they do of D4 in between.
#pragma once

#include "cuda/relay.cuh"

namespace deep_a2a::cuda {

// What a rail peer's dispatch has put to this rank, though all ranks refuse it, is waited for, by one thread for each
// stream; nobody uses it.
__device__ inline bool drain_streams(const Context& c) {
  const int idx = stream_of_thread(c);
  if (idx < 0) return true;
  const Stream stream = stream_of(c, idx);
  const int rounds = c.sizes.num_rounds;
  int rows = rows_for_node(c, stream.peer);
  bool ok = true;
  for (int round = 0; round < min(rounds, kStagedRounds); ++round) {
    for (int chunk = 0; ok && (chunk * c.sizes.rows_per_chunk < rows || (rounds > 1 && chunk == 0)); ++chunk) {
      const uint64_t* word = c.own_word(Region::kChunkFlag, chunk_word_idx(c, idx, round, chunk));
      const uint64_t acquired = wait_epoch(c, word, Step::kD5Relay, stream.peer);
      ok = acquired != 0;
      if (ok && rounds > 1) rows = Tag::rows_of(acquired);
    }
  }
  return ok;
}

// D5 where all rounds have room at once, which is mostly one. False where the kernel has to be left.
__device__ inline bool relay_all(const Context& c, Relay& relay) {
  const ChunkTasks tasks(c);
  const int turns = tasks.turns(), all = turns * c.sizes.num_rounds;
  TurnChunks chunks;
  bool ok = true;
  const auto next = [&](Chunk& chunk) {
    while (ok && !chunks.next(c, chunk)) {
      const int turn = take_turn(c.control.grid.moved_chunks), round = turn / turns;
      if (turn >= all) return false;
      ok =
          chunks.begin(c, tasks, round, turn % turns, [&](int stream, int) { return relay.round_rows(stream, round); });
    }
    return ok;
  };
  return relay.run(next) && ok;
}

// D5 of each round, and between them D4 of the rounds for which it makes room, by send_turn(round, turn).
template <class SendTurn>
__device__ bool relay_rounds(const Context& c, Relay& relay, SendTurn&& send_turn) {
  const ChunkTasks tasks(c);
  const int turns = tasks.turns(), rounds = c.sizes.num_rounds;
  // While rounds are left to be sent, every round has as many turns for D4 as for D5.
  const int both = 2 * turns * (rounds - kStagedRounds), all = both + turns * kStagedRounds;
  for (int turn = take_turn(c.control.grid.moved_chunks); turn < all; turn = take_turn(c.control.grid.moved_chunks)) {
    const int kind = turn / turns;  // rounds, those with both twice
    const bool in_both = turn < both;
    const int round = in_both ? kind / 2 : kind - both / turns / 2;
    bool ok = true;
    if (in_both && kind % 2 == 1) {
      ok = send_turn(round + kStagedRounds, turn % turns);
    } else {
      TurnChunks chunks;
      ok =
          chunks.begin(c, tasks, round, turn % turns, [&](int stream, int) { return relay.round_rows(stream, round); });
      ok = ok && relay.run([&](Chunk& chunk) { return chunks.next(c, chunk); });
    }
    if (!ok) return false;
  }
  return true;
}

// D5. Warps come when they have nothing else to do. False where the kernel has to be left.
template <class SendTurn>
__device__ bool d5_relay(const Context& c, const DispatchTask& t, SendTurn&& send_turn) {
  if (warp_idx() >= t.plan.move_warps) return true;
  // Scales in the warp's stages, if it has pushed or pulled: it has accessed them by ordinary and async loads, and
  // stores.
  ptx::fence_proxy_async_shared();
  __syncwarp();
  Relay relay(c, t, BasesArena(c, t.plan));
  const bool ok = c.sizes.num_rounds > kStagedRounds ? relay_rounds(c, relay, send_turn) : relay_all(c, relay);
  relay.count_bytes();
  return ok;
}

}  // namespace deep_a2a::cuda
