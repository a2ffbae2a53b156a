// Waiting with a deadline, signalling, and what happens when a wait fails. See "Faults" in docs/protocol.md.
#pragma once

#include "cuda/faults.cuh"
#include "cuda/streams.cuh"

namespace deep_a2a::cuda {

constexpr int kPollsPerCheck = 64;  // of a word, before the clock and the abort word are looked at

// Tests: a release comes late by up to kMostDelayNs, drawn from the seed, so that nobody can count on it being early.
constexpr uint64_t kMostDelayNs = 20000;
DEEP_A2A_COLD void delay_release(uint64_t seed, const uint64_t* word, uint64_t value) {
  uint64_t mixed = (seed ^ reinterpret_cast<uint64_t>(word) / sizeof(*word)) * 0x9E3779B97F4A7C15u + value;
  mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9u;
  const uint64_t start = ptx::global_timer();
  while (ptx::global_timer() - start < (mixed >> 32) % kMostDelayNs) __nanosleep(100);
}

// Release: what this thread, and whoever it has synchronised with, stored before is visible to who acquires `value`.
__device__ inline void signal(const Team& team, uint64_t* word, uint64_t value) {
  if (team.delay_seed != 0) delay_release(team.delay_seed, word, value);
  ptx::st_release_sys(word, value);
}

// What is polled: a word in the own window, of which the upper bits count, or a counter of the grid. A look that
// acquires drops the SM's whole first-level cache, which other warps live on: it is for waits of a whole block.
enum class Look : int { kRelaxed, kAcquire };

template <Look kLook>
struct WindowWord {
  const uint64_t* word;
  int shift = 0;

  __device__ uint64_t load() const {
    return kLook == Look::kAcquire ? ptx::ld_acquire_sys(word) : ptx::ld_relaxed_sys(word);
  }
  __device__ uint64_t progress(uint64_t seen) const { return seen >> shift; }
};
struct GridWord {
  const uint32_t* word;

  __device__ uint64_t load() const { return ptx::ld_acquire_gpu(word); }
  __device__ uint64_t progress(uint64_t seen) const { return seen; }
};

// Who waits, and what for.
struct Wait {
  Step step;
  int peer;
  int lane;
  uint64_t epoch;
  uint64_t expected;
};

// A word as it was seen last, and whether it has come. If not, this rank or another gave up, and the kernel has to be
// left.
struct Seen {
  uint64_t word;
  bool has_come;
};

// Polls until the word has come as far as `expected`.
template <class Word>
DEEP_A2A_COLD Seen keep_waiting(const Team& team, Word word, Wait w) {
  uint64_t seen = word.load();
  if (word.progress(seen) >= w.expected) return {seen, true};
  // Who waits for the own rank, or for a relay, waits for another thread that waits for a peer: that one should be the
  // first to give up.
  const bool is_second = w.peer == team.rank || w.step == Step::kD6Relayed;
  const uint64_t patience = team.timeout_ns + (is_second ? team.timeout_ns / 8 : 0);
  const uint64_t start = ptx::global_timer();
  while (true) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsPerCheck; ++poll) {
      seen = word.load();
      if (word.progress(seen) >= w.expected) return {seen, true};
    }
    if (const uint64_t by = abort_word(team)) {
      report_fault(team, by);
      return {seen, false};
    }
    const uint64_t waited = ptx::global_timer() - start;
    if (waited >= patience) {
      give_up(team, {Fault::kTimeout, w.step, team.rank, w.peer, w.lane, static_cast<uint32_t>(waited / 1000000),
                     w.epoch, w.expected, word.progress(seen)});
      return {seen, false};
    }
  }
}

// The first look acquires at once: credits have mostly come long before.
__device__ inline bool wait(const Context& c, const uint64_t* word, uint64_t expected, Step step, int peer) {
  if (ptx::ld_acquire_sys(word) >= expected) return true;
  const WindowWord<Look::kRelaxed> polled{word};
  if (!keep_waiting(c.team, polled, {step, peer, c.lane, c.epoch, expected}).has_come) return false;
  ptx::ld_acquire_sys(word);
  return true;
}

// For a word with a tag, whatever the tag is: what has been acquired; 0 where the kernel has to be left.
template <Look kLook = Look::kRelaxed>
__device__ inline uint64_t wait_epoch(const Context& c, const uint64_t* word, Step step, int peer) {
  const WindowWord<kLook> polled{word, Tag::kBits + Tag::kRowBits};
  const Seen seen = keep_waiting(c.team, polled, {step, peer, c.lane, c.epoch, c.epoch});
  if (!seen.has_come) return 0;
  return kLook == Look::kAcquire ? seen.word : ptx::ld_acquire_sys(word);
}

// Another call than the own one has been acquired. What an aborted operation has left behind is none.
DEEP_A2A_COLD void report_mismatch(const Team& team, Wait w, uint32_t seen) {
  if (const uint64_t by = abort_word(team)) {
    report_fault(team, by);
  } else {
    give_up(team, {Fault::kMismatch, w.step, team.rank, w.peer, w.lane, 0, w.epoch, w.expected, seen});
  }
}

// Gives up where the tag is not the own one.
template <Look kLook = Look::kRelaxed>
__device__ inline bool wait_tagged(const Context& c, const uint64_t* word, Step step, int peer) {
  const uint64_t acquired = wait_epoch<kLook>(c, word, step, peer);
  if (acquired == 0) return false;
  const uint32_t tag = Tag::of(acquired);
  if (tag == c.tag) return true;
  report_mismatch(c.team, {step, peer, c.lane, c.epoch, c.tag}, tag);
  return false;
}

// All threads of the block: each waits for what it was given, all learn whether everybody got it.
__device__ inline bool all_of_block(bool ok) { return __syncthreads_and(ok) != 0; }

// The block has come to a point of the grid. One thread calls it, after a barrier of the block. Returns how many blocks
// had come before.
__device__ inline uint32_t grid_arrive(uint32_t& counter) { return ptx::atom_add_acq_rel_gpu(&counter, 1); }

__device__ inline bool grid_wait(const Context& c, const uint32_t& counter) {
  return keep_waiting(c.team, GridWord{&counter}, {Step::kGrid, c.team.rank, c.lane, c.epoch, gridDim.x}).has_come;
}

// A warp has done its share, one of `warps` in its block: true in all lanes of the one warp of the grid that comes
// last. What the others did before is visible to it.
__device__ inline bool last_warp(uint32_t& in_block, int warps, uint32_t& in_grid) {
  __syncwarp();
  bool last = false;
  if (static_cast<int>(threadIdx.x) % kWarpThreads == 0) {
    last = ptx::atom_add_acq_rel_cta(&in_block, 1) == static_cast<uint32_t>(warps) - 1 &&
           grid_arrive(in_grid) == gridDim.x - 1;
  }
  last = __any_sync(kFullWarp, last) != 0;
  __syncwarp();
  return last;
}

// All threads: true in every thread of the one block that comes last. What the others did before is visible to it.
__device__ inline bool last_block(const Context& c, uint32_t& counter) {
  __syncthreads();
  if (threadIdx.x == 0) c.shared.last_block = grid_arrive(counter) == gridDim.x - 1;
  __syncthreads();
  return c.shared.last_block != 0;
}

// For one more thread, beside those that wait: a kernel that was enqueued behind one that gave up must not begin.
__device__ inline bool not_aborted(const Context& c) {
  if (static_cast<int>(threadIdx.x) != c.num_locals()) return true;
  const uint64_t by = abort_word(c.team);
  if (by != 0) report_fault(c.team, by);
  return by == 0;
}

// The index of a thread among those that have a rail peer each, behind those that have a rank of the node; else -1.
__device__ inline int stream_of_thread(const Context& c) {
  const int idx = static_cast<int>(threadIdx.x) - c.num_locals() - 1;
  return idx < num_streams(c) ? max(idx, -1) : -1;
}

// Two words for each giver, used in turn.
__device__ inline int64_t lane_credit_idx(const Context& c, uint64_t epoch, int giver) {
  return static_cast<int64_t>(epoch & 1) * c.num_ranks() + giver;
}

// D0, C0: the previous operation of this lane is over at every rank of the node and every rail peer. One thread for
// each. Peers that have to say who is late see that this rank has come.
__device__ inline bool wait_lane_credit(const Context& c, Step step) {
  if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1) *c.own_word(Region::kProgress, 0) = c.epoch;
  const int local = static_cast<int>(threadIdx.x), stream = stream_of_thread(c);
  if (local >= c.num_locals() && stream < 0) return not_aborted(c);
  const int peer = stream >= 0 ? stream_of(c, stream).peer : c.neighbour(local);
  const uint64_t previous = c.epoch - 1;
  return wait(c, c.own_word(Region::kLaneCredit, lane_credit_idx(c, previous, peer)), previous, step, peer);
}

// This rank has finished the operation; by one block, once all have left what the operation uses.
__device__ inline void give_lane_credit(const Context& c) {
  const int local = static_cast<int>(threadIdx.x), stream = stream_of_thread(c);
  const int64_t idx = lane_credit_idx(c, c.epoch, c.team.rank);
  if (local < c.num_locals()) signal(c.team, c.word(local, Region::kLaneCredit, c.lane, idx), c.epoch);
  if constexpr (kHasNetwork) {
    if (stream < 0) return;
    uint64_t* word = c.own_word(Region::kLaneCredit, idx);
    if (c.team.delay_seed != 0) delay_release(c.team.delay_seed, word, c.epoch);
    remote_signal(word, c.epoch, stream_of(c, stream).pe);
  }
}

// The slot's last reader is done: one more release, told to the ranks of the node, which write into it. One block.
__device__ inline void release_slot(const Team& team, int slot) {
  SlotControl& control = team.control->slots[slot];
  const Topology& topology = team.shape.topology;
  const uint64_t releases = ptx::ld_relaxed_sys(&control.releases) + 1;
  __syncthreads();
  const int local = static_cast<int>(threadIdx.x);
  if (local == 0) control.releases = releases;
  if (local >= topology.ranks_per_node) return;
  auto* words = reinterpret_cast<uint64_t*>(team.windows[local] + team.layout.offset(Region::kSlotCredit));
  signal(team, words + int64_t{slot} * topology.ranks_per_node + team.sizes.local_rank, releases);
}

// Sets the tagged word of this rank at every rank of the node: one thread of the block for each, or one lane of a warp.
__device__ inline void signal_rank(const Context& c, Region region, int local) {
  if (local >= c.num_locals()) return;
  signal(c.team, c.word(local, region, c.lane, c.local_rank()), Tag::word(c.epoch, c.tag));
}
__device__ inline void signal_node(const Context& c, Region region) {
  signal_rank(c, region, static_cast<int>(threadIdx.x));
}
__device__ inline void warp_signals_node(const Context& c, Region region) { signal_rank(c, region, lane_idx()); }

// All threads: the tagged word of every rank of the node, or false in all of them. Whoever issues bulk loads of what
// the words stand for has to fence the proxies first.
__device__ inline bool wait_node_tagged(const Context& c, Region region, Step step) {
  const int local = static_cast<int>(threadIdx.x);
  return all_of_block(local < c.num_locals()
                          ? wait_tagged<Look::kAcquire>(c, c.own_word(region, local), step, c.neighbour(local))
                          : not_aborted(c));
}

// The same for the lanes of a warp.
__device__ inline bool warp_waits_tagged(const Context& c, Region region, Step step) {
  const int local = lane_idx();
  const bool ok = local >= c.num_locals() || wait_tagged(c, c.own_word(region, local), step, c.neighbour(local));
  const bool all = __all_sync(kFullWarp, ok) != 0;
  __syncwarp();
  return all;
}

// C5, and the end of a dispatch whose rows are pulled: all threads of the last block. The ranks of the node have given
// their lanes' credit, too: they have read this rank's rows.
__device__ inline bool wait_rows_read(const Context& c, Step step) {
  const int local = static_cast<int>(threadIdx.x), peer = c.neighbour(local);
  const uint64_t* word = c.own_word(Region::kLaneCredit, lane_credit_idx(c, c.epoch, peer));
  return all_of_block(local >= c.num_locals() || wait(c, word, c.epoch, step, peer));
}

// One thread has acquired a word that a put has set: brings in the bytes that came before it.
__device__ inline void acquire_put(uint64_t* word, uint64_t value) {
  if constexpr (kHasNetwork) flush_arrivals(word, value);
}

// One thread: whether a chunk has arrived, without waiting; nothing is acquired.
__device__ inline bool chunk_is_here(const Context& c, int stream_idx, int round, int idx) {
  const uint64_t* word = c.own_word(Region::kChunkFlag, chunk_word_idx(c, stream_idx, round, idx));
  return Tag::epoch_of(ptx::ld_relaxed_sys(word)) >= c.epoch;
}

// One thread: a chunk has arrived; false where the kernel has to be left. Whoever issues bulk loads of it has to fence
// the proxies first. With several rounds `round_rows` becomes what the word says.
__device__ inline bool wait_chunk(const Context& c, int stream_idx, int round, int idx, Step step, int& round_rows) {
  uint64_t* word = c.own_word(Region::kChunkFlag, chunk_word_idx(c, stream_idx, round, idx));
  if (!wait_tagged(c, word, step, stream_of(c, stream_idx).peer)) return false;
  acquire_put(word, Tag::word(c.epoch, 0));
  if (c.sizes.num_rounds > 1) round_rows = Tag::rows_of(ptx::ld_relaxed_sys(word));
  return true;
}

// One thread: a chunk of a round has been read at the rail peer. False where the kernel has to be left.
__device__ inline bool wait_chunk_credit(const Context& c, int stream_idx, int round, int idx, Step step) {
  const uint64_t* word = c.own_word(Region::kChunkCredit, chunk_word_idx(c, stream_idx, round, idx));
  return wait(c, word, c.epoch, step, stream_of(c, stream_idx).peer);
}

}  // namespace deep_a2a::cuda
