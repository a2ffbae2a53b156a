// The values of count vectors as the ranks of a node exchange them (D2): words that bring their epoch along, so that no
// flag has to follow them, and who wants one waits for it alone.
#pragma once

#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

// The index of a value among the int32 of a count vector, as CountVector has them.
constexpr int kHeaderWords = sizeof(CountHeader) / 4;
__device__ inline int node_rows_idx(int node) { return kHeaderWords + node; }
__device__ inline int rank_rows_idx(const Context& c, int rank) { return kHeaderWords + c.sizes.num_nodes + rank; }

__device__ inline int values_of_vector(const Context& c) {
  return rank_rows_idx(c, c.num_ranks() + c.shape.num_experts);
}

// A word that is waited for.
struct CountPoll {
  const uint64_t* word;
  uint64_t epoch;

  __device__ uint64_t load() const { return ptx::ld_relaxed_sys(word); }
  __device__ uint64_t progress(uint64_t seen) const { return CountWord::epoch(seen, epoch); }
};

// A value of this rank's vector, or as a relay of another's, to a rank of the node.
__device__ inline void store_count(const Context& c, int local, int source, int idx, int32_t value) {
  uint64_t* word = c.count_word(local, source, idx);
  if (c.team.delay_seed != 0) delay_release(c.team.delay_seed, word, c.epoch);
  ptx::st_relaxed_sys(word, CountWord::make(c.epoch, value));
}

// A value that has been waited for.
__device__ inline int32_t read_count(const Context& c, int source, int idx) {
  return CountWord::value(ptx::ld_relaxed_sys(c.count_word(c.local_rank(), source, idx)));
}

// Of the rows of a rail peer, those that come to this node.
__device__ inline int32_t rows_for_node(const Context& c, int peer) {
  return read_count(c, peer, node_rows_idx(c.own_node()));
}

// Of a word that has been looked at once: its value, when it has come. False in `ok` where the kernel has to be left.
__device__ inline int32_t wait_count(const Context& c, int source, int idx, uint64_t seen, bool& ok) {
  const CountPoll poll{c.count_word(c.local_rank(), source, idx), c.epoch};
  if (!ok || poll.progress(seen) == c.epoch) return CountWord::value(seen);
  const Seen last = keep_waiting(c.team, poll, {Step::kD3Bases, source, c.lane, c.epoch, c.epoch});
  ok = last.has_come;
  return CountWord::value(last.word);
}
__device__ inline int32_t wait_count(const Context& c, int source, int idx, bool& ok) {
  return wait_count(c, source, idx, ptx::ld_relaxed_sys(c.count_word(c.local_rank(), source, idx)), ok);
}

}  // namespace deep_a2a::cuda
