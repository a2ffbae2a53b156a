// The part of the runtime API that is about streams.
#include <atomic>
#include <unordered_map>

#include "emulator/runtime_error.hpp"
#include "emulator/stream.hpp"

namespace deep_a2a::emulator {
namespace {

struct Streams {
  std::mutex mutex;
  std::unordered_map<cudaStream_t, std::shared_ptr<Stream>> all;
  std::atomic<cudaError_t> null_error{cudaSuccess};
};

Streams& streams() {
  static Streams& instance = *new Streams;  // never destroyed: threads may run until the process ends
  return instance;
}

}  // namespace

bool is_null_stream(cudaStream_t stream) {
  constexpr uintptr_t kLastSpecialHandle = 2;  // cudaStreamLegacy, cudaStreamPerThread
  return reinterpret_cast<uintptr_t>(stream) <= kLastSpecialHandle;
}

std::shared_ptr<Stream> find_stream(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(streams().mutex);
  const auto known = streams().all.find(stream);
  return known == streams().all.end() ? nullptr : known->second;
}

cudaError_t submit(cudaStream_t stream, Work work) {
  if (is_null_stream(stream)) {
    if (const cudaError_t error = streams().null_error; error != cudaSuccess) return error;
    const cudaError_t error = work();
    if (error != cudaSuccess) streams().null_error = error;
    return error;
  }
  const std::shared_ptr<Stream> queue = find_stream(stream);
  return queue == nullptr ? cudaErrorInvalidResourceHandle : queue->submit(std::move(work));
}

cudaError_t synchronize(cudaStream_t stream) {
  if (is_null_stream(stream)) return streams().null_error;
  const std::shared_ptr<Stream> queue = find_stream(stream);
  return queue == nullptr ? cudaErrorInvalidResourceHandle : queue->synchronize();
}

cudaError_t synchronize_all() {
  std::unordered_map<cudaStream_t, std::shared_ptr<Stream>> all;
  {
    const std::lock_guard<std::mutex> lock(streams().mutex);
    all = streams().all;
  }
  cudaError_t first = streams().null_error;
  for (const auto& [handle, queue] : all) {
    const cudaError_t error = queue->synchronize();
    if (first == cudaSuccess) first = error;
  }
  return first;
}

}  // namespace deep_a2a::emulator

using deep_a2a::emulator::remember;

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (stream == nullptr || flags > cudaStreamNonBlocking) return remember(cudaErrorInvalidValue);
  auto created = std::make_shared<deep_a2a::emulator::Stream>();
  *stream = reinterpret_cast<cudaStream_t>(created.get());
  const std::lock_guard<std::mutex> lock(deep_a2a::emulator::streams().mutex);
  deep_a2a::emulator::streams().all[*stream] = std::move(created);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

// Waits for the work of the stream, unlike CUDA's, which only lets go of it.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::shared_ptr<deep_a2a::emulator::Stream> last;
  const std::lock_guard<std::mutex> lock(deep_a2a::emulator::streams().mutex);
  auto& all = deep_a2a::emulator::streams().all;
  const auto known = all.find(stream);
  if (known == all.end()) return remember(cudaErrorInvalidResourceHandle);
  last = std::move(known->second);
  all.erase(known);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return remember(deep_a2a::emulator::synchronize(stream)); }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (deep_a2a::emulator::is_null_stream(stream)) return cudaStreamSynchronize(stream);
  const auto queue = deep_a2a::emulator::find_stream(stream);
  return remember(queue == nullptr ? cudaErrorInvalidResourceHandle : queue->query());
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (status == nullptr) return remember(cudaErrorInvalidValue);
  *status = cudaStreamCaptureStatusNone;
  const bool exists = deep_a2a::emulator::is_null_stream(stream) || deep_a2a::emulator::find_stream(stream) != nullptr;
  return remember(exists ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaDeviceSynchronize() { return remember(deep_a2a::emulator::synchronize_all()); }
