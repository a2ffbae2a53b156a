#include "emulator/stream.hpp"

#include <utility>

#include "emulator/launch.hpp"

namespace deep_a2a::emulator {

void Moment::reach(cudaError_t error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_reached_ = true;
  error_ = error;
  time_ns_ = clock_ns();
  reached_.notify_all();
}

cudaError_t Moment::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  reached_.wait(lock, [&] { return is_reached_; });
  return error_;
}

cudaError_t Moment::query() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return is_reached_ ? error_ : cudaErrorNotReady;
}

Stream::~Stream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Stream::push(std::function<void()> entry) {
  queue_.push_back(std::move(entry));
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  changed_.notify_all();
}

cudaError_t Stream::submit(Work work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (error_ != cudaSuccess) return error_;
  push([this, work = std::move(work)] {
    const cudaError_t before = [&] {
      const std::lock_guard<std::mutex> inner(mutex_);
      return error_;
    }();
    if (before != cudaSuccess) return;
    const cudaError_t error = work();
    const std::lock_guard<std::mutex> inner(mutex_);
    error_ = error;
  });
  return cudaSuccess;
}

cudaError_t Stream::record(std::shared_ptr<Moment> moment) {
  const std::lock_guard<std::mutex> lock(mutex_);
  push([this, moment = std::move(moment)] {
    const cudaError_t error = [&] {
      const std::lock_guard<std::mutex> inner(mutex_);
      return error_;
    }();
    moment->reach(error);
  });
  return error_;
}

cudaError_t Stream::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return queue_.empty(); });
  return error_;
}

cudaError_t Stream::query() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_ == cudaSuccess && !queue_.empty() ? cudaErrorNotReady : error_;
}

void Stream::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return ends_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::function<void()> entry = std::move(queue_.front());
    lock.unlock();
    entry();
    lock.lock();
    queue_.pop_front();
    changed_.notify_all();
  }
}

}  // namespace deep_a2a::emulator
