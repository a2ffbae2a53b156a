#include "cpu/network.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "cpu/copy.hpp"

namespace deep_a2a::cpu {
namespace {

constexpr int64_t kMaxPieces = 8;
constexpr unsigned kOneKeptBackIn = 16;
constexpr std::chrono::milliseconds kKeptBack{3};

void set_word(const Put& put) {
  store_release(put.word, put.value);
  put.doorbell->ring();
}

}  // namespace

void deliver(const Put& put) {
  if (put.bytes > 0) copy_streaming(put.to, put.from, put.bytes);
  streaming_fence();
  set_word(put);
}

DisturbedNetwork::DisturbedNetwork(uint64_t seed) : random_(seed), thread_([this] { run(); }) {}

DisturbedNetwork::~DisturbedNetwork() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void DisturbedNetwork::submit(const Put& put) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto same_word = [&](const Pending& other) { return other.put.word == put.word; };
  if (std::any_of(pending_.begin(), pending_.end(), same_word)) violation_ = "two puts in flight for one word";
  if (!violation_.empty()) throw std::logic_error(violation_);
  const int64_t pieces = put.bytes > 0 ? 1 + static_cast<int64_t>(random_() % kMaxPieces) : 0;
  Pending pending{put, {put.from, put.from + put.bytes}, {}, pieces > 0 ? (put.bytes + pieces - 1) / pieces : 0, {}};
  if (random_() % kOneKeptBackIn == 0) pending.not_before = std::chrono::steady_clock::now() + kKeptBack;
  for (int64_t start = 0; start < put.bytes; start += pending.piece_bytes) pending.pieces.push_back(start);
  std::shuffle(pending.pieces.begin(), pending.pieces.end(), random_);
  pending_.push_back(std::move(pending));
  wake_.notify_one();
}

void DisturbedNetwork::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !pending_.empty(); });
    if (pending_.empty()) return;
    if (!stopping_ && random_() % 8 == 0) {  // be late, so that puts pile up and can overtake each other
      const auto delay = std::chrono::microseconds(random_() % 300);
      lock.unlock();
      std::this_thread::sleep_for(delay);
      lock.lock();
    }
    step(lock);
  }
}

int64_t DisturbedNetwork::choose() {
  const auto now = std::chrono::steady_clock::now();
  std::vector<int64_t> free;
  for (size_t i = 0; i < pending_.size(); ++i) {
    if (stopping_ || pending_[i].not_before <= now) free.push_back(static_cast<int64_t>(i));
  }
  return free.empty() ? -1 : free[random_() % free.size()];
}

// One piece of one put, or its signal once no piece is left.
void DisturbedNetwork::step(std::unique_lock<std::mutex>& lock) {
  const int64_t chosen = choose();
  if (chosen < 0) {
    wake_.wait_for(lock, kKeptBack / 8);
    return;
  }
  Pending& pending = pending_[static_cast<size_t>(chosen)];
  if (pending.pieces.empty()) {
    const Put put = pending.put;
    if (!std::equal(pending.promised.begin(), pending.promised.end(), put.from)) {
      violation_ = "the source of a put was changed before it was delivered";
    }
    pending_.erase(pending_.begin() + chosen);
    lock.unlock();
    set_word(put);
    lock.lock();
    return;
  }
  const int64_t start = pending.pieces.back();
  pending.pieces.pop_back();
  const Put put = pending.put;
  const int64_t bytes = std::min(pending.piece_bytes, put.bytes - start);
  lock.unlock();  // only this thread removes puts, so nothing of this one moves meanwhile
  std::memcpy(put.to + start, put.from + start, static_cast<size_t>(bytes));
  lock.lock();
}

}  // namespace deep_a2a::cpu
