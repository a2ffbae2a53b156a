// Bulk copies of a launch that are under way. They read and write in pieces, at random moments, in random order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/random.hpp"
#include "emulator/thread.hpp"

namespace deep_a2a::emulator {

class BulkCopies {
 public:
  explicit BulkCopies(Random& random);
  ~BulkCopies();

  // Called by a fiber.
  void load(Thread& thread, char* to_shared, const char* from_global, uint32_t bytes, uint64_t* barrier);
  void store(Thread& thread, char* to_global, const char* from_shared, uint32_t bytes);
  void commit(Thread& thread);
  // Whether all but the latest `num_pending` groups of the thread have read their sources, or are complete.
  bool have_read(Thread& thread, int num_pending);
  bool are_complete(Thread& thread, int num_pending);

  size_t pending() const { return copies_.size(); }
  // Some steps: few, so that threads see copies that are half done.
  void advance();
  // One step, at times.
  void advance_at_times();

  // Throw KernelError where a thread, or the last one of a block, has not waited for its copies.
  void check_exit(const Thread& thread) const;
  void check_end(const Block& block) const;

 private:
  static constexpr int kMostPieces = 4;

  enum class PieceState : int { kUnread, kRead, kWritten };

  struct Copy {
    Block* block;
    char* to;
    const char* from;
    uint32_t bytes;
    uint64_t* barrier = nullptr;  // of a load
    BulkGroup* group = nullptr;   // of a store
    uint32_t piece_bytes = 0;
    int num_pieces = 0;
    int unread = 0;
    int unwritten = 0;
    PieceState pieces[kMostPieces] = {};
    bool lazy = false;
    std::unique_ptr<char[]> buffer{};
  };

  void add(Copy copy);
  void step(size_t idx);
  void read(Copy& copy, int piece);
  void write(Copy& copy, int piece);

  Random& random_;
  std::vector<std::unique_ptr<Copy>> copies_;
  const uint32_t step_every_;  // calls of advance_at_times, on average
  const uint32_t lazy_one_in_;
};

}  // namespace deep_a2a::emulator
