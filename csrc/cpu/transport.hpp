// The protocol's verbs over shared-memory windows: store, signal, wait, put_signal; and what happens when a wait fails.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/doorbell.hpp"
#include "cpu/network.hpp"
#include "cpu/window.hpp"
#include "protocol/layout.hpp"

namespace deep_a2a::cpu {

// Where an operation stands: the lane it runs on and its number there.
struct Turn {
  int lane;
  uint64_t epoch;
};

// Whom a wait is for; named in errors.
struct Awaited {
  Step step;
  int peer;
};

class Transport {
 public:
  // `windows` by rank, the own one included. Without a seed the network delivers at once.
  Transport(const Shape& shape, int rank, std::vector<std::shared_ptr<Window>> windows, double timeout_s,
            std::optional<uint64_t> network_seed);

  const Shape& shape() const { return shape_; }
  const Topology& topology() const { return shape_.topology; }
  const WindowLayout& layout() const { return layout_; }
  int rank() const { return rank_; }
  int node() const { return topology().node_of(rank_); }
  int local_rank() const { return topology().local_of(rank_); }
  // Ranks of the own node, and the rail peer of each other node.
  int neighbour(int local_rank) const { return topology().rank_of(node(), local_rank); }
  int rail_peer(int stream_idx) const {
    return topology().rail_peer(rank_, topology().stream_node(node(), stream_idx));
  }
  // Where a rail peer keeps what comes from this rank.
  int stream_at_peer(int stream_idx) const {
    return topology().stream_idx(topology().stream_node(node(), stream_idx), node());
  }

  char* region(int rank, Region region, int instance = 0) const {
    return windows_[rank]->data() + layout_.offset(region, instance);
  }
  uint64_t* word(int rank, Region region, int lane, int64_t idx) const {
    return reinterpret_cast<uint64_t*>(this->region(rank, region, lane)) + idx;
  }

  // Release: what this rank stored before is visible to who acquires `value`.
  void signal(int rank, int lane, uint64_t* word, uint64_t value);
  // The same to every rank of the node, at index `idx` of a region of words.
  void signal_node(const Turn& turn, Region region, int64_t idx, uint64_t value);
  // As `signal`, but any lane of the rank may be waiting.
  void signal_all_lanes(int rank, uint64_t* word, uint64_t value);
  // `to` and `word` in the window of `rank`; `from` stays untouched until the receiver gives credit.
  void put_signal(int rank, int lane, char* to, const char* from, int64_t bytes, uint64_t* word, uint64_t value);

  // Acquire: returns once `*word >= expected`. Throws CommTimeoutError at the deadline, PeerAbortError on an abort.
  void wait(const Turn& turn, const uint64_t* word, uint64_t expected, Awaited awaited);
  // Returns once one of the words has reached its value; the first of them is named when none does.
  struct Condition {
    const uint64_t* word;
    uint64_t expected;
    Awaited awaited;
    bool tagged = false;
  };
  void wait_any(const Turn& turn, const std::vector<Condition>& conditions);
  // As `wait` for a word with a tag; MismatchError, for everybody, where the tag is not `tag`.
  void wait_tagged(const Turn& turn, const uint64_t* word, uint32_t tag, Awaited awaited);

  // An operation begins: told to those who may have to name who is late.
  void begin(const Turn& turn);
  // This rank cannot go on for a reason of its own: nobody needs to wait for it.
  void abandon(const Turn& turn);
  // Delivers what is on its way. No put may follow.
  void close() { disturbed_.reset(); }

  // Throws when this rank or another has given up, or after poison().
  void throw_if_aborted();
  // For errors that every rank finds by itself and that no later operation can survive.
  void poison(std::exception_ptr error);

  void count_shm_bytes(int64_t bytes) { shm_bytes_.fetch_add(bytes, std::memory_order_relaxed); }
  int64_t shm_bytes() const { return shm_bytes_.load(std::memory_order_relaxed); }
  int64_t network_bytes() const { return network_bytes_.load(std::memory_order_relaxed); }

 private:
  Doorbell* doorbell(int rank, int lane) const {
    return reinterpret_cast<Doorbell*>(region(rank, Region::kDoorbell, lane));
  }
  uint64_t abort_word() const { return load_acquire(word(rank_, Region::kAbort, 0, 0)); }
  [[noreturn]] void give_up(const FaultRecord& record);
  void tell_all(const FaultRecord& record);
  std::exception_ptr error_of(const FaultRecord& record) const;

  const Shape shape_;
  const WindowLayout layout_;
  const int rank_;
  const std::vector<std::shared_ptr<Window>> windows_;
  const std::chrono::nanoseconds timeout_;
  std::mutex give_up_mutex_;
  std::mutex poison_mutex_;
  std::exception_ptr poison_;  // set once, before poisoned_
  std::atomic<bool> poisoned_{false};
  std::atomic<int64_t> shm_bytes_{0};
  std::atomic<int64_t> network_bytes_{0};
  std::unique_ptr<DisturbedNetwork> disturbed_;  // last: delivers what is left before the windows go
};

}  // namespace deep_a2a::cpu
