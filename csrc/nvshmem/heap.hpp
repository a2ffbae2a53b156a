// Symmetric memory, given out and taken back by each process for itself.
//
// nvshmem_malloc and nvshmem_free are collective over the job, and neither fits Buffers: those may be over a part of
// the job's ranks, are dropped when Python collects them, at another time on each rank, and after a fault some ranks
// never come. So the heap asks the library for blocks, which it never gives back, and windows are ranges of these. To
// free one is a matter of the own process. To get one, the ranks of a Buffer compare their free ranges and all take the
// same.
//
// A range that was given back may still be a target of puts, by any rank of its Buffer. It is free, for Buffers that
// have all those ranks, once each of them says that it is: each waits for its own puts first (settle).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/window.hpp"

namespace deep_a2a::network {

// In the order of the job's blocks, and by offset in them: the same numbers mean the same memory on every PE.
struct Range {
  int block;
  int64_t offset;
  int64_t bytes;
};

class SymmetricHeap {
 public:
  static constexpr int64_t kAlignment = 4096;

  static SymmetricHeap& instance();

  // Collective over the job. One more block; std::bad_alloc where there is no memory.
  void grow(int64_t bytes, int device);

  // What a Buffer over `pes` may take as far as this process knows, the largest ones first, at most `most`.
  std::vector<Range> free_ranges(const std::vector<int>& pes, int most) const;
  // Zeroed. The range is given back when the last reference to the window goes.
  std::shared_ptr<cuda::Window> take(const Range& range, const std::vector<int>& pes, int device);
  // The memory of a window at another PE as it is mapped here, or null. It lives as long as the job.
  std::shared_ptr<cuda::Window> reach(const cuda::Window& window, int pe, int device) const;

  // Waits for the puts of this process, and frees what was given back before: false where they are not over in time.
  bool settle(double timeout_s, int device);
  // After a fault: the range of this window never becomes free.
  void lose(const cuda::Window& window);

  int64_t bytes() const;
  // Once the job is over. No window may be left.
  void forget_all();

 private:
  friend struct Lease;
  enum class Use : int { kFree, kTaken, kGivenBack, kLost };
  // Parts of a block lie side by side, by offset.
  struct Part {
    int64_t offset;
    int64_t bytes;
    Use use;
    std::vector<int> writers;  // PEs whose puts may be on their way to it, sorted
    uint64_t number;           // of the window that has taken it
  };
  struct Block {
    char* data;
    std::vector<Part> parts;
  };

  SymmetricHeap() = default;
  template <class Visit>
  void visit_parts(Visit&& visit) {
    for (Block& block : blocks_) {
      for (Part& part : block.parts) visit(block, part);
    }
  }
  static void merge_free(std::vector<Part>& parts);
  void give_back(uint64_t number);

  mutable std::mutex mutex_;
  std::vector<Block> blocks_;
  uint64_t num_windows_ = 0;
};

}  // namespace deep_a2a::network
