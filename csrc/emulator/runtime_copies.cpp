// The part of the runtime API that copies and fills memory.
#include <cstring>
#include <string>

#include "emulator/allocations.hpp"
#include "emulator/runtime_error.hpp"
#include "emulator/stream.hpp"

namespace deep_a2a::emulator {
namespace {

// Rows that lie `pitch` bytes apart.
struct Rows {
  char* data;
  size_t pitch;
};

bool is_pageable(const void* pointer) {
  Allocation found;
  return !Allocations::instance().find(pointer, found);
}

void copy_rows(Rows to, Rows from, size_t width, size_t height) {
  for (size_t row = 0; row < height; ++row) memmove(to.data + row * to.pitch, from.data + row * from.pitch, width);
}

cudaError_t copy(Rows to, Rows from, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  if (width == 0 || height == 0) return submit(stream, [] { return cudaSuccess; });
  if (to.data == nullptr || from.data == nullptr || (height > 1 && (to.pitch < width || from.pitch < width))) {
    return cudaErrorInvalidValue;
  }
  // CUDA reads pageable memory of the host before it returns.
  if (kind == cudaMemcpyHostToDevice && is_pageable(from.data)) {
    std::string staged(width * height, '\0');
    copy_rows({staged.data(), width}, from, width, height);
    return submit(stream, [=]() mutable {
      copy_rows(to, {staged.data(), width}, width, height);
      return cudaSuccess;
    });
  }
  const cudaError_t error = submit(stream, [=] {
    copy_rows(to, from, width, height);
    return cudaSuccess;
  });
  // And has written it.
  if (error != cudaSuccess || kind != cudaMemcpyDeviceToHost || !is_pageable(to.data)) return error;
  return cudaStreamSynchronize(stream);
}

Rows one_row(const void* data) { return {static_cast<char*>(const_cast<void*>(data)), 0}; }

}  // namespace
}  // namespace deep_a2a::emulator

using deep_a2a::emulator::remember;

cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (to == nullptr && bytes > 0) return remember(cudaErrorInvalidValue);
  return remember(deep_a2a::emulator::submit(stream, [=] {
    if (bytes > 0) memset(to, value, bytes);
    return cudaSuccess;
  }));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  using deep_a2a::emulator::one_row;
  return remember(deep_a2a::emulator::copy(one_row(to), one_row(from), bytes, 1, kind, stream));
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  const deep_a2a::emulator::Rows target{static_cast<char*>(to), to_pitch};
  const deep_a2a::emulator::Rows source{static_cast<char*>(const_cast<void*>(from)), from_pitch};
  return remember(deep_a2a::emulator::copy(target, source, width, height, kind, stream));
}
