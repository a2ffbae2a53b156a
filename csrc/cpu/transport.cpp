#include "cpu/transport.hpp"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "common/check.hpp"
#include "cpu/copy.hpp"
#include "protocol/faults.hpp"

namespace deep_a2a::cpu {
namespace {

constexpr int kPolls = 100;  // before yielding: enough for a flag that is about to come
constexpr int kYields = 20;  // before sleeping: with more ranks than cores the others need the core
constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::milliseconds(100);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

bool reached(const Transport::Condition& condition) { return load_acquire(condition.word) >= condition.expected; }

}  // namespace

Transport::Transport(const Shape& shape, int rank, std::vector<std::shared_ptr<Window>> windows, double timeout_s,
                     std::optional<uint64_t> network_seed)
    : shape_(shape),
      layout_(make_layout(shape)),
      rank_(rank),
      windows_(std::move(windows)),
      timeout_(static_cast<int64_t>(timeout_s * 1e9)) {
  validate(shape_);
  check_argument(static_cast<int>(windows_.size()) == topology().num_ranks, "expected one window per rank, got ",
                 windows_.size());
  check_argument(rank >= 0 && rank < topology().num_ranks, "rank must be in [0, ", topology().num_ranks, "), got ",
                 rank);
  for (const auto& window : windows_) {
    check_argument(window->bytes() >= layout_.bytes, "a window has ", window->bytes(), " bytes, expected ",
                   layout_.bytes);
  }
  if (network_seed)
    disturbed_ = std::make_unique<DisturbedNetwork>(*network_seed * 1000003u + static_cast<uint64_t>(rank));
}

void Transport::signal(int rank, int lane, uint64_t* word, uint64_t value) {
  streaming_fence();
  store_release(word, value);
  doorbell(rank, lane)->ring();
}

void Transport::signal_node(const Turn& turn, Region region, int64_t idx, uint64_t value) {
  for (int local = 0; local < topology().ranks_per_node; ++local) {
    const int peer = neighbour(local);
    signal(peer, turn.lane, word(peer, region, turn.lane, idx), value);
  }
}

void Transport::signal_all_lanes(int rank, uint64_t* word, uint64_t value) {
  store_release(word, value);
  for (int lane = 0; lane < shape_.num_lanes; ++lane) doorbell(rank, lane)->ring();
}

void Transport::put_signal(int rank, int lane, char* to, const char* from, int64_t bytes, uint64_t* word,
                           uint64_t value) {
  network_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  const Put put{to, from, bytes, word, value, doorbell(rank, lane)};
  if (disturbed_) {
    disturbed_->submit(put);
  } else {
    deliver(put);
  }
}

void Transport::wait(const Turn& turn, const uint64_t* word, uint64_t expected, Awaited awaited) {
  const Condition condition{word, expected, awaited};
  if (reached(condition)) return;
  wait_any(turn, {condition});
}

void Transport::wait_any(const Turn& turn, const std::vector<Condition>& conditions) {
  const auto ready = [&] { return std::any_of(conditions.begin(), conditions.end(), reached); };
  for (int poll = 0; poll < kPolls; ++poll) {
    if (ready()) return;
    relax();
  }
  for (int yields = 0; yields < kYields; ++yields) {
    ::sched_yield();
    if (ready()) return;
  }
  Doorbell* bell = doorbell(rank_, turn.lane);
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    const uint32_t rings = bell->read();  // before looking: what is set later rings later
    if (ready()) return;
    throw_if_aborted();
    const std::chrono::nanoseconds waited = std::chrono::steady_clock::now() - start;
    if (waited >= timeout_) {
      const Condition& first = conditions.front();
      const auto epoch_of = [&](uint64_t word) { return first.tagged ? Tag::epoch_of(word) : word; };
      const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(waited).count();
      give_up({Fault::kTimeout, first.awaited.step, rank_, first.awaited.peer, turn.lane, static_cast<uint32_t>(ms),
               turn.epoch, epoch_of(first.expected), epoch_of(load_acquire(first.word))});
    }
    bell->sleep(rings, std::min(timeout_ - waited, kLongestSleep).count());
  }
}

void Transport::wait_tagged(const Turn& turn, const uint64_t* word, uint32_t tag, Awaited awaited) {
  const Condition condition{word, Tag::word(turn.epoch, 0), awaited, true};
  if (!reached(condition)) wait_any(turn, {condition});
  const uint32_t seen = Tag::of(load_acquire(word));
  if (seen != tag) give_up({Fault::kMismatch, awaited.step, rank_, awaited.peer, turn.lane, 0, turn.epoch, tag, seen});
}

void Transport::begin(const Turn& turn) {
  throw_if_aborted();
  store_release(word(rank_, Region::kProgress, turn.lane, 0), turn.epoch);
}

void Transport::poison(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(poison_mutex_);
  if (!poisoned_) poison_ = std::move(error);
  poisoned_ = true;
}

// What is seen first stays the answer, whoever else gives up later.
void Transport::throw_if_aborted() {
  if (!poisoned_) {
    const uint64_t aborted_by = abort_word();
    if (aborted_by == 0) return;
    FaultRecord record;
    std::memcpy(&record, region(rank_, Region::kFaults) + (aborted_by - 1) * sizeof(record), sizeof(record));
    poison(error_of(record));
  }
  std::rethrow_exception(poison_);
}

// The first lane of this rank to give up tells everybody; a second one throws what the first found. Poisoned before
// anybody is told: a peer that gives up at the same time overwrites the abort word, and must not take the place of what
// this rank found itself.
void Transport::give_up(const FaultRecord& record) {
  std::lock_guard<std::mutex> lock(give_up_mutex_);
  throw_if_aborted();
  poison(error_of(record));
  tell_all(record);
  std::rethrow_exception(poison_);
}

void Transport::abandon(const Turn& turn) {
  std::lock_guard<std::mutex> lock(give_up_mutex_);
  if (abort_word() == 0) tell_all({Fault::kUnexpected, Step::kD0Credit, rank_, rank_, turn.lane, 0, turn.epoch, 0, 0});
}

void Transport::tell_all(const FaultRecord& record) {
  const int64_t offset = rank_ * static_cast<int64_t>(sizeof(record));
  const uint64_t value = static_cast<uint64_t>(rank_) + 1;
  char* own = region(rank_, Region::kFaults) + offset;
  std::memcpy(own, &record, sizeof(record));
  for (int peer = 0; peer < topology().num_ranks; ++peer) {
    char* to = region(peer, Region::kFaults) + offset;
    uint64_t* abort = word(peer, Region::kAbort, 0, 0);
    if (topology().node_of(peer) == node()) {
      if (peer != rank_) std::memcpy(to, own, sizeof(record));
      signal_all_lanes(peer, abort, value);
    } else {  // one lane is woken; the others look at least every kLongestSleep
      put_signal(peer, record.lane, to, own, sizeof(record), abort, value);
    }
  }
}

std::exception_ptr Transport::error_of(const FaultRecord& record) const {
  std::vector<uint64_t> begun;
  for (int rank = 0; rank < topology().num_ranks; ++rank) {
    begun.push_back(load_acquire(word(rank, Region::kProgress, record.lane, 0)));
  }
  return deep_a2a::error_of(record, rank_, topology(), begun);
}

}  // namespace deep_a2a::cpu
