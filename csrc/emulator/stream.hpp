// Streams: queues of work, each with an OS thread of its own; and events, which are points in them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "cuda_runtime_api.h"

namespace deep_a2a::emulator {

using Work = std::function<cudaError_t()>;

// One recording of an event.
class Moment {
 public:
  void reach(cudaError_t error);
  cudaError_t wait();
  cudaError_t query();  // cudaErrorNotReady before it
  uint64_t time_ns() const { return time_ns_; }

 private:
  std::mutex mutex_;
  std::condition_variable reached_;
  bool is_reached_ = false;
  cudaError_t error_ = cudaSuccess;
  uint64_t time_ns_ = 0;
};

class Stream {
 public:
  Stream() = default;
  ~Stream();  // after all work is done
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // The first error of the work so far: after it nothing more is done.
  cudaError_t submit(Work work);
  // A point after all work so far, which comes whether or not that failed.
  cudaError_t record(std::shared_ptr<Moment> moment);
  cudaError_t synchronize();
  cudaError_t query();

 private:
  void push(std::function<void()> entry);
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;  // the first one is under way
  bool ends_ = false;
  cudaError_t error_ = cudaSuccess;
  std::thread thread_;  // from first use on
};

// The null stream, for which `stream` is null or one of CUDA's special handles: runs work in the caller.
bool is_null_stream(cudaStream_t stream);
// Null for what is not a stream.
std::shared_ptr<Stream> find_stream(cudaStream_t stream);

// To a stream or the null stream.
cudaError_t submit(cudaStream_t stream, Work work);
cudaError_t synchronize_all();

}  // namespace deep_a2a::emulator
