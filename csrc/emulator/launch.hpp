// One kernel launch: its blocks, and the scheduler that runs their threads in random order on the calling OS thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/block.hpp"
#include "emulator/bulk_copies.hpp"
#include "emulator/random.hpp"

namespace deep_a2a::emulator {

constexpr int kNumSms = 16;
constexpr size_t kMaxSharedBytes = 232448;        // that a kernel can ask for
constexpr size_t kDefaultSharedBytes = 48 << 10;  // without asking

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

// Who can end a wait that polls: threads and copies of this launch alone, or also other launches, processes and time.
enum class Poll : int { kLocal, kOutside };

class Launch {
 public:
  // `body` is what every thread runs.
  Launch(const LaunchShape& shape, std::function<void()> body, uint64_t seed);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // Until all threads have ended; throws KernelError.
  void run();

  // For the running fiber.
  static Launch& current();
  static Thread& self();
  void poll(Poll kind);            // found nothing to do: lets others run
  void preempt();                  // lets others run, at times
  void block(const char* reason);  // until release()
  void release(Thread* thread);
  void watch(std::vector<Thread*>& watchers);  // until wake(), or for a while
  void wake(std::vector<Thread*>& watchers);

  void note_progress() { progress_ = true; }
  void note_outside() { polled_outside_ = true; }  // this wait can end without the launch's doing
  Random& random() { return random_; }
  BulkCopies& copies() { return copies_; }
  const LaunchShape& shape() const { return shape_; }

 private:
  static void run_thread();
  void switch_out();
  void resume(Thread* thread);
  void start_blocks();
  void end_thread(Thread* thread);
  void sweep();
  void make_ready(Thread* thread);
  void wake_all();
  bool is_skipped(const Thread& thread);
  void draw_stall();
  void idle();
  [[noreturn]] void fail_deadlock() const;

  const LaunchShape shape_;
  const std::function<void()> body_;
  Random random_;
  BulkCopies copies_;
  Context scheduler_;
  std::vector<std::unique_ptr<Block>> blocks_;  // resident
  uint64_t next_block_ = 0;
  uint64_t num_blocks_;
  std::vector<Thread*> ready_;  // to run in the next sweep
  std::vector<Thread*> sweeping_;
  std::string failure_;  // of the thread that ran last
  uint64_t num_sweeps_ = 0;
  const uint32_t stall_every_;     // sweeps between two stalls of a warp, on average
  const uint32_t stall_most_;      // sweeps that a stall lasts at most
  const uint32_t skip_one_in_;     // threads that a sweep leaves out; 0: none
  const uint32_t advance_one_in_;  // sweeps that find nothing to do but copies, which some threads wait for
  bool progress_ = true;
  bool polled_outside_ = false;
  bool skipped_ = false;
  uint64_t idle_sweeps_ = 0;
  uint64_t idle_since_ns_ = 0;
};

uint64_t clock_ns();

}  // namespace deep_a2a::emulator
