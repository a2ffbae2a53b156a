// A lane's thread: runs operations one after the other, as a stream would.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "cpu/transport.hpp"

namespace deep_a2a::cpu {

// A point that a lane will pass: everything before it is done, or has failed.
class Event {
 public:
  void set(std::exception_ptr error = nullptr);
  bool is_set() const;
  void wait();                       // rethrows the error it was set with
  std::exception_ptr error() const;  // null if it was not set, or set without one

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool set_ = false;
  std::exception_ptr error_;
};

class Lane {
 public:
  explicit Lane(int idx) : turn_{idx, 0}, thread_([this] { run(); }) {}
  ~Lane() { stop(); }
  // Runs what was enqueued, then ends the thread. Later work fails at once.
  void stop();

  // Begins a new epoch and runs `work` in it. The event carries what it throws.
  std::shared_ptr<Event> begin(std::function<void(const Turn&)> work) { return enqueue(std::move(work), true); }
  // Runs `work` in the epoch that was begun last.
  std::shared_ptr<Event> resume(std::function<void(const Turn&)> work) { return enqueue(std::move(work), false); }

 private:
  struct Job {
    std::function<void(const Turn&)> work;
    bool new_epoch;
    std::shared_ptr<Event> event;
  };

  std::shared_ptr<Event> enqueue(std::function<void(const Turn&)> work, bool new_epoch);
  void run();

  Turn turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::mutex join_mutex_;
  std::thread thread_;  // last: everything it uses exists by then
};

}  // namespace deep_a2a::cpu
