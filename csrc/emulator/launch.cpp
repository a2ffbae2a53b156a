#include "emulator/launch.hpp"

#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <utility>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/intrinsics.hpp"
#include "emulator/stack_pool.hpp"

namespace deep_a2a::emulator {
namespace {

thread_local Launch* current_launch = nullptr;
thread_local Thread* current_thread = nullptr;

constexpr uint32_t kPreemptOneIn = 16;
// Polls may be false without reason, so one idle sweep proves nothing.
constexpr uint64_t kIdleSweepsOfDeadlock = 200;
constexpr uint64_t kIdleSweepsBeforeYield = 4;
constexpr uint64_t kIdleSweepsBeforeSleep = 64;
constexpr unsigned kSleepUs = 50;
constexpr uint64_t kSweepsPerWake = 128;
constexpr size_t kPrefetch = 2;  // threads ahead: what a switch touches is seldom in the cache

// Some launches run almost in step, others let warps fall far behind.
uint32_t pick(Random& random, std::initializer_list<uint32_t> choices) {
  return choices.begin()[random.below(static_cast<uint32_t>(choices.size()))];
}

// Stacks begin at different places of their pages, else all of them would fight for the same few lines of the caches.
size_t color(unsigned thread_idx) { return thread_idx * 5 % 64 * 64; }

}  // namespace

uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

Launch::Launch(const LaunchShape& shape, std::function<void()> body, uint64_t seed)
    : shape_(shape),
      body_(std::move(body)),
      random_(seed),
      copies_(random_),
      num_blocks_(uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z),
      stall_every_(pick(random_, {4, 16, 64})),
      stall_most_(pick(random_, {4, 32, 256})),
      skip_one_in_(pick(random_, {0, 0, 2, 4})),
      advance_one_in_(pick(random_, {1, 1, 2, 8})) {}

Launch::~Launch() = default;

Launch& Launch::current() { return *current_launch; }
Thread& Launch::self() { return *current_thread; }

void Launch::run() {
  current_launch = this;
  blockDim = shape_.block;
  gridDim = shape_.grid;
  try {
    start_blocks();
    while (!blocks_.empty()) sweep();
  } catch (...) {
    current_launch = nullptr;
    throw;
  }
  current_launch = nullptr;
}

// As many as there are SMs run at once; the others wait for their places.
void Launch::start_blocks() {
  while (blocks_.size() < kNumSms && next_block_ < num_blocks_) {
    blocks_.push_back(std::make_unique<Block>(*this, next_block_++));
    for (Thread& thread : blocks_.back()->threads()) {
      prepare_context(&thread.context, thread.stack, kStackBytes - color(thread.linear_idx), &Launch::run_thread);
      ready_.push_back(&thread);
    }
  }
}

void Launch::run_thread() {
  Launch& launch = current();
  Thread& thread = self();
  begin_context(&launch.scheduler_);
  try {
    launch.body_();
    launch.copies_.check_exit(thread);
    if (!thread.async_loads.empty()) throw KernelError("exits with async loads that it has not waited for");
  } catch (const std::exception& error) {
    launch.failure_ = text(thread.block->where(), ", thread ", thread.linear_idx, ": ", error.what());
  }
  thread.state = ThreadState::kDone;
  launch.progress_ = true;
  launch.switch_out();
}

void Launch::resume(Thread* thread) {
  current_thread = thread;
  threadIdx = thread->idx;
  blockIdx = thread->block->idx();
  switch_context(&scheduler_, &thread->context);
  if (!failure_.empty()) throw KernelError(failure_);
  if (thread->state == ThreadState::kDone) end_thread(thread);
}

void Launch::switch_out() { switch_context(&current_thread->context, &scheduler_); }

void Launch::poll(Poll kind) {
  if (kind == Poll::kOutside) polled_outside_ = true;
  ready_.push_back(current_thread);
  switch_out();
}

void Launch::watch(std::vector<Thread*>& watchers) {
  watchers.push_back(current_thread);
  current_thread->state = ThreadState::kWatching;
  switch_out();
}

void Launch::wake(std::vector<Thread*>& watchers) {
  for (Thread* thread : watchers) {
    if (thread->state == ThreadState::kWatching) make_ready(thread);
  }
  watchers.clear();
}

// So that a wait with a deadline looks at the clock at times.
void Launch::wake_all() {
  for (auto& block : blocks_) {
    for (Thread& thread : block->threads()) {
      if (thread.state == ThreadState::kWatching) make_ready(&thread);
    }
  }
}

void Launch::preempt() {
  progress_ = true;
  if (!random_.once_in(kPreemptOneIn)) return;
  ready_.push_back(current_thread);
  switch_out();
}

void Launch::block(const char* reason) {
  progress_ = true;
  current_thread->waits_for = reason;
  current_thread->state = ThreadState::kBlocked;
  switch_out();
}

void Launch::release(Thread* thread) {
  if (thread->state == ThreadState::kBlocked) make_ready(thread);
}

void Launch::make_ready(Thread* thread) {
  thread->state = ThreadState::kReady;
  ready_.push_back(thread);
}

void Launch::end_thread(Thread* thread) {
  Block* block = thread->block;
  if (block->exit(thread) > 0) return;
  copies_.check_end(*block);
  block->check_end();
  for (auto& resident : blocks_) {
    if (resident.get() != block) continue;
    std::swap(resident, blocks_.back());
    blocks_.pop_back();
    break;
  }
  start_blocks();
}

// Runs each thread that can run once, in random order.
void Launch::sweep() {
  if (++num_sweeps_ % kSweepsPerWake == 0) wake_all();
  draw_stall();
  const bool may_skip = progress_;  // else there is nothing to fall behind of
  progress_ = polled_outside_ = skipped_ = false;
  sweeping_.swap(ready_);
  const size_t count = sweeping_.size();
  for (size_t i = 0; i + 1 < count; ++i) {
    std::swap(sweeping_[i], sweeping_[i + random_.below(static_cast<uint32_t>(count - i))]);
  }
  for (size_t i = 0; i < count; ++i) {
    if (i + 2 * kPrefetch < count) __builtin_prefetch(sweeping_[i + 2 * kPrefetch]);
    if (i + kPrefetch < count) prefetch_context(sweeping_[i + kPrefetch]->context);
    if (may_skip && is_skipped(*sweeping_[i])) {
      ready_.push_back(sweeping_[i]);
      skipped_ = true;
      continue;
    }
    resume(sweeping_[i]);
    copies_.advance_at_times();
  }
  sweeping_.clear();
  if (progress_) {
    idle_sweeps_ = 0;
  } else if (copies_.pending() > 0) {
    if (random_.once_in(advance_one_in_)) copies_.advance();
  } else if (!skipped_) {
    idle();
  }
}

bool Launch::is_skipped(const Thread& thread) {
  return thread.warp->stalled_until > num_sweeps_ || (skip_one_in_ != 0 && random_.once_in(skip_one_in_));
}

void Launch::draw_stall() {
  if (!random_.once_in(stall_every_)) return;
  Block& block = *blocks_[random_.below(static_cast<uint32_t>(blocks_.size()))];
  Warp& warp = block.warps()[random_.below(static_cast<uint32_t>(block.warps().size()))];
  warp.stalled_until = num_sweeps_ + 1 + random_.below(stall_most_);
}

// Nothing here can go on by itself.
void Launch::idle() {
  const uint64_t now = clock_ns();
  if (++idle_sweeps_ == 1) idle_since_ns_ = now;
  wake_all();
  if (ready_.empty() || (!polled_outside_ && idle_sweeps_ >= kIdleSweepsOfDeadlock)) fail_deadlock();
  if (static_cast<double>(now - idle_since_ns_) > idle_limit() * 1e9) {
    throw KernelError(text("nothing but polling for ", idle_limit(), " s"));
  }
  if (idle_sweeps_ >= kIdleSweepsBeforeSleep) {
    usleep(kSleepUs);
  } else if (idle_sweeps_ >= kIdleSweepsBeforeYield) {
    sched_yield();
  }
}

void Launch::fail_deadlock() const {
  std::string all = "deadlock: no thread can go on";
  for (const auto& block : blocks_) all += "; " + block->where() + ": " + block->describe_waits();
  throw KernelError(all);
}

}  // namespace deep_a2a::emulator
