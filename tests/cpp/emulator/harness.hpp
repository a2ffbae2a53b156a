// What the emulator's tests share: expectations that say what failed, device arrays, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "emulator/control.hpp"

namespace deep_a2a::emulator_test {

constexpr int kMostShown = 50;
inline int num_failures = 0;

template <class... Parts>
void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  if (++num_failures <= kMostShown) std::printf("FAILED: %s\n", text(parts...).c_str());
}

template <class A, class B, class... Parts>
void expect_equal(const A& seen, const B& expected, const Parts&... parts) {
  expect(seen == expected, parts..., ": expected ", expected, ", got ", seen);
}

// Device memory, which the host reads and writes directly.
template <class T>
class Array {
 public:
  explicit Array(size_t size, T value = {}) : size_(size) {
    if (cudaMalloc(&data_, size * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    fill(value);
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* get() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }
  void fill(T value) {
    for (size_t i = 0; i < size_; ++i) data_[i] = value;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// On a stream of its own, so that a failure stays with it.
template <class... Params, class... Args>
cudaError_t run(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  if (shared_bytes > 0) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  cudaGetLastError();
  return error;
}

template <class... Params, class... Args>
void run_well(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  const cudaError_t error = run(kernel, grid, block, shared_bytes, args...);
  expect(error == cudaSuccess, "a launch failed with ", cudaGetErrorName(error), ": ", emulator::last_message());
}

inline uint32_t hash(uint32_t value) {
  value = (value ^ (value >> 16)) * 0x7FEB352Du;
  value = (value ^ (value >> 15)) * 0x846CA68Bu;
  return value ^ (value >> 16);
}

void test_processes();  // first: it forks
void test_warps();
void test_blocks();
void test_copies();
void test_races();
void test_failures();
void test_functions();
void test_runtime();
void test_network();

}  // namespace deep_a2a::emulator_test
