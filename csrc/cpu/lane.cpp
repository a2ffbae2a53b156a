#include "cpu/lane.hpp"

#include "common/errors.hpp"

namespace deep_a2a::cpu {

void Event::set(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (set_) return;
  set_ = true;
  error_ = std::move(error);
  changed_.notify_all();
}

bool Event::is_set() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return set_;
}

std::exception_ptr Event::error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void Event::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return set_; });
  if (error_) std::rethrow_exception(error_);
}

void Lane::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  std::lock_guard<std::mutex> lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<Event> Lane::enqueue(std::function<void(const Turn&)> work, bool new_epoch) {
  auto event = std::make_shared<Event>();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) {
      event->set(std::make_exception_ptr(CommError("the Buffer was destroyed")));
      return event;
    }
    jobs_.push_back({std::move(work), new_epoch, event});
  }
  wake_.notify_one();
  return event;
}

void Lane::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      if (job.new_epoch) ++turn_.epoch;
      job.work(turn_);
    } catch (...) {
      error = std::current_exception();
    }
    job.work = nullptr;  // what it holds goes before anybody hears that it is done
    job.event->set(error);
    lock.lock();
  }
}

}  // namespace deep_a2a::cpu
