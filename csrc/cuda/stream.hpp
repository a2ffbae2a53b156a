// Streams and events of the host side, owned.
#pragma once

#include "cuda/api.hpp"

namespace deep_a2a::cuda {

// Of the highest priority: blocks of communication kernels get free SMs before those of compute kernels.
class Stream {
 public:
  explicit Stream(int device) : device_(device) {
    const OnDevice on(device);
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(int device) : device_(device) {
    const OnDevice on(device);
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) {
    const OnDevice on(device_);
    check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  void block(cudaStream_t stream) const {
    const OnDevice on(device_);  // the null stream is the current device's
    check_cuda(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
  }
  void synchronize() const { check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize"); }
  bool done() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) return false;
    check_cuda(status, "cudaEventQuery");
    return true;
  }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace deep_a2a::cuda
