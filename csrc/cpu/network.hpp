// The verb across nodes. In tests it can be told to deliver as badly as a network may.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/doorbell.hpp"

namespace deep_a2a::cpu {

// One put with its signal, addresses in this process.
struct Put {
  char* to = nullptr;
  const char* from = nullptr;  // must stay as it is until the receiver has given credit
  int64_t bytes = 0;
  uint64_t* word = nullptr;
  uint64_t value = 0;
  Doorbell* doorbell = nullptr;
};

// Copies the bytes, then sets the word: the word vouches for these bytes alone.
void deliver(const Put& put);

// Delivers puts from a thread of its own, in an order drawn from `seed`: late, in small pieces, pieces of several puts
// interleaved, signals overtaking other puts and other signals, some by so much that an operation may end meanwhile.
// Only the bytes of a put precede its own signal. Watches the rules that a real network relies on: one put in flight
// per word, sources left alone.
class DisturbedNetwork {
 public:
  explicit DisturbedNetwork(uint64_t seed);
  ~DisturbedNetwork();  // delivers what is left

  void submit(const Put& put);

 private:
  struct Pending {
    Put put;
    std::vector<char> promised;   // the bytes as they were when submitted: the source may not touch them
    std::vector<int64_t> pieces;  // starts of the pieces still to be copied, in random order
    int64_t piece_bytes;
    std::chrono::steady_clock::time_point not_before;
  };

  void run();
  void step(std::unique_lock<std::mutex>& lock);
  // One of those that are not kept back, or -1; of all once no more come.
  int64_t choose();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Pending> pending_;
  std::mt19937_64 random_;
  std::string violation_;  // the first rule of put_signal that was broken; the next submit reports it
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace deep_a2a::cpu
