// Calls of the CUDA runtime that throw what failed.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.hpp"
#include "common/errors.hpp"

namespace deep_a2a::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call starts anew
  throw CommError(text(what, " failed: ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ")"));
}

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace deep_a2a::cuda
