// One block: threads, warps, shared memory and the barriers of both kinds.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/block_barrier.hpp"
#include "emulator/mbarriers.hpp"
#include "emulator/shared_memory.hpp"
#include "emulator/thread.hpp"
#include "emulator/warp.hpp"

namespace deep_a2a::emulator {

class Launch;

class Block {
 public:
  // `number` counts the blocks of the launch, x fastest.
  Block(Launch& launch, uint64_t number);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const uint3& idx() const { return idx_; }
  std::vector<Thread>& threads() { return threads_; }
  std::vector<Warp>& warps() { return warps_; }
  const SharedMemory& shared() const { return shared_; }
  Mbarriers& mbarriers() { return mbarriers_; }
  BlockBarriers& barriers() { return barriers_; }

  // Returns how many threads have not exited.
  unsigned exit(Thread* thread);
  void check_end() const;
  std::string where() const;
  std::string describe_waits() const;

 private:
  uint3 idx_;
  SharedMemory shared_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Mbarriers mbarriers_;
  BlockBarriers barriers_;
};

}  // namespace deep_a2a::emulator
