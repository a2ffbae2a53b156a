// The mbarriers of a block. Their state is kept here; the word in shared memory only shows that it has been left alone.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/shared_memory.hpp"

namespace deep_a2a::emulator {

class Launch;
struct Thread;

constexpr int64_t kMostMbarrierCount = (1 << 20) - 1;  // of arrivals, and of bytes either way

class Mbarriers {
 public:
  Mbarriers(Launch& launch, const SharedMemory& shared) : launch_(launch), shared_(shared) {}

  void init(uint64_t* word, uint32_t arrivals);
  void arrive(uint64_t* word);
  void arrive_expect(uint64_t* word, uint32_t bytes);
  // Whether the phase of this parity is over.
  bool test(uint64_t* word, uint32_t parity);
  // A thread knows it: the loads of phases that are over count as waited for.
  void note_seen(uint64_t* word) { find(word, "mbarrier_try_wait").loads_unseen = 0; }

  // Called by a fiber: until the phase of this moment is over, or for a while.
  void watch(uint64_t* word);

  void add_load(uint64_t* word);
  void complete_bytes(uint64_t* word, uint32_t bytes);

  // What is wrong when the block has ended, or empty.
  std::string objection_at_end() const;
  std::string describe() const;  // of those in the middle of a phase

 private:
  struct Mbarrier {
    uint32_t arrivals;  // of a phase
    uint32_t pending;
    int64_t bytes = 0;  // expected and not yet come
    uint64_t phase = 0;
    int loads_of_phase = 0;
    int loads_unseen = 0;  // of phases that are over
    std::vector<Thread*> watchers{};
  };

  Mbarrier& find(uint64_t* word, const char* operation);
  void add_bytes(Mbarrier& barrier, int64_t bytes, const char* operation);
  void finish_phase(Mbarrier& barrier);

  Launch& launch_;
  const SharedMemory& shared_;
  std::unordered_map<uint64_t*, Mbarrier> barriers_;
};

}  // namespace deep_a2a::emulator
