// The host's side: memory, copies, streams, events, launches that are refused, errors that stay.
#include <cstring>

#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

__global__ void await(uint64_t* word, uint64_t value) {
  while (ptx::ld_acquire_sys(word) < value) __nanosleep(100);
}
__global__ void append(int* list, int value) { list[++list[0]] = value; }
__global__ void fail() { __trap(); }
__global__ void nothing() {}

cudaLaunchConfig_t config_of(cudaStream_t stream, unsigned grid = 1, unsigned block = 1, size_t shared_bytes = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  expect_equal(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, -1), cudaSuccess, "cudaStreamCreate");
  return stream;
}

void check_order() {
  const cudaStream_t first = new_stream(), second = new_stream();
  cudaEvent_t start, gate, end;
  cudaEventCreate(&start);
  cudaEventCreateWithFlags(&gate, cudaEventDisableTiming);
  cudaEventCreate(&end);
  Array<uint64_t> word(1);
  Array<int> list(8);
  expect_equal(cudaEventQuery(gate), cudaSuccess, "an event that was never recorded");
  const cudaLaunchConfig_t on_first = config_of(first), on_second = config_of(second);
  cudaEventRecord(start, first);
  cudaLaunchKernelEx(&on_first, await, word.get(), uint64_t{1});
  cudaLaunchKernelEx(&on_first, append, list.get(), 1);
  cudaEventRecord(gate, first);
  cudaStreamWaitEvent(second, gate, 0);
  cudaLaunchKernelEx(&on_second, append, list.get(), 2);
  cudaEventRecord(end, second);
  expect_equal(cudaStreamQuery(first), cudaErrorNotReady, "a stream that waits");
  expect_equal(cudaEventQuery(gate), cudaErrorNotReady, "an event that waits");
  expect_equal(cudaPeekAtLastError(), cudaSuccess, "the last error after cudaErrorNotReady");
  __atomic_store_n(word.get(), 1, __ATOMIC_RELEASE);
  cudaStreamWaitEvent(nullptr, end);  // the null stream is the caller
  const cudaLaunchConfig_t on_null = config_of(nullptr);
  cudaLaunchKernelEx(&on_null, append, list.get(), 3);
  expect(list[0] == 3 && list[1] == 1 && list[2] == 2 && list[3] == 3, "work out of order");
  expect_equal(cudaEventSynchronize(gate), cudaSuccess, "cudaEventSynchronize");
  float milliseconds = -1;
  expect_equal(cudaEventElapsedTime(&milliseconds, start, end), cudaSuccess, "cudaEventElapsedTime");
  expect(milliseconds >= 0, "time went back: ", milliseconds, " ms");
  expect_equal(cudaEventElapsedTime(&milliseconds, gate, end), cudaErrorInvalidResourceHandle, "an event without time");
  expect_equal(cudaDeviceSynchronize(), cudaSuccess, "cudaDeviceSynchronize");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
  expect_equal(cudaStreamIsCapturing(first, &capture), cudaSuccess, "cudaStreamIsCapturing");
  expect_equal(capture, cudaStreamCaptureStatusNone, "capture status");
  for (cudaEvent_t event : {start, gate, end}) expect_equal(cudaEventDestroy(event), cudaSuccess, "cudaEventDestroy");
  for (cudaStream_t stream : {first, second}) expect_equal(cudaStreamDestroy(stream), cudaSuccess, "cudaStreamDestroy");
  expect_equal(cudaStreamSynchronize(first), cudaErrorInvalidResourceHandle, "a stream that is gone");
  expect_equal(cudaGetLastError(), cudaErrorInvalidResourceHandle, "the last error");
  expect_equal(cudaGetLastError(), cudaSuccess, "the last error, taken");
}

void check_sticky() {
  const cudaStream_t broken = new_stream(), waiting = new_stream(), other = new_stream();
  cudaEvent_t event;
  cudaEventCreate(&event);
  Array<int> list(8);
  const cudaLaunchConfig_t on_broken = config_of(broken), on_other = config_of(other);
  expect_equal(cudaLaunchKernelEx(&on_broken, fail), cudaSuccess, "a launch that will fail");
  cudaEventRecord(event, broken);
  cudaStreamWaitEvent(waiting, event, 0);
  expect_equal(cudaStreamSynchronize(broken), cudaErrorLaunchFailure, "a stream that has failed");
  expect_equal(emulator::last_message(), "block 0, thread 0: __trap", "its message");
  expect_equal(cudaLaunchKernelEx(&on_broken, append, list.get(), 1), cudaErrorLaunchFailure,
               "a launch after a failure");
  expect_equal(cudaMemsetAsync(list.get(), 1, 4, broken), cudaErrorLaunchFailure, "work after a failure");
  expect_equal(cudaEventSynchronize(event), cudaErrorLaunchFailure, "an event after a failure");
  expect_equal(cudaStreamSynchronize(waiting), cudaErrorLaunchFailure, "a stream that waited for a failure");
  expect_equal(cudaLaunchKernelEx(&on_other, append, list.get(), 1), cudaSuccess, "another stream");
  expect_equal(cudaDeviceSynchronize(), cudaErrorLaunchFailure, "the device");
  expect_equal(list[0], 1, "kernels that ran");
  for (cudaStream_t stream : {broken, waiting, other}) cudaStreamDestroy(stream);
  cudaEventDestroy(event);
  cudaGetLastError();
}

void check_copies() {
  const cudaStream_t stream = new_stream();
  constexpr size_t kBytes = 64;
  char *device = nullptr, *pinned = nullptr, *alias = nullptr;
  expect_equal(cudaMalloc(&device, kBytes), cudaSuccess, "cudaMalloc");
  expect_equal(cudaHostAlloc(&pinned, kBytes, cudaHostAllocMapped | cudaHostAllocPortable), cudaSuccess,
               "cudaHostAlloc");
  expect_equal(cudaHostGetDevicePointer(&alias, pinned, 0), cudaSuccess, "cudaHostGetDevicePointer");
  expect(alias == pinned, "pinned memory has two addresses");
  Array<uint64_t> word(1);
  const cudaLaunchConfig_t on_stream = config_of(stream);
  char source[kBytes], target[kBytes] = {};
  for (size_t i = 0; i < kBytes; ++i) source[i] = static_cast<char>(i);
  cudaLaunchKernelEx(&on_stream, await, word.get(), uint64_t{1});
  cudaMemcpyAsync(device, source, kBytes, cudaMemcpyHostToDevice, stream);
  memset(source, 0, kBytes);  // pageable memory was read before the call returned
  __atomic_store_n(word.get(), 1, __ATOMIC_RELEASE);
  cudaMemcpyAsync(target, device, kBytes, cudaMemcpyDeviceToHost, stream);  // and is written before it returns
  for (size_t i = 0; i < kBytes; ++i) expect_equal(int{target[i]}, static_cast<int>(i), "byte ", i);
  expect_equal(cudaMemsetAsync(pinned, 7, kBytes, stream), cudaSuccess, "cudaMemsetAsync");
  cudaMemcpy2DAsync(pinned + 1, 16, device, 8, 4, 3, cudaMemcpyDeviceToDevice, stream);
  cudaStreamSynchronize(stream);
  for (size_t i = 0; i < kBytes; ++i) {
    const size_t row = (i - 1) / 16, column = (i - 1) % 16;
    const bool copied = i >= 1 && row < 3 && column < 4;
    expect_equal(int{pinned[i]}, copied ? static_cast<int>(row * 8 + column) : 7, "byte ", i, " of a copy of rows");
  }
  expect_equal(cudaMemcpy(target, pinned, kBytes, cudaMemcpyDefault), cudaSuccess, "cudaMemcpy");
  expect(memcmp(target, pinned, kBytes) == 0, "cudaMemcpy has copied something else");
  expect_equal(cudaMemset(device, 0, kBytes), cudaSuccess, "cudaMemset");
  expect_equal(cudaFree(pinned), cudaErrorInvalidValue, "cudaFree of the host's memory");
  expect_equal(cudaFreeHost(pinned), cudaSuccess, "cudaFreeHost");
  expect_equal(cudaFree(device), cudaSuccess, "cudaFree");
  expect_equal(cudaFree(device), cudaErrorInvalidValue, "cudaFree, twice");
  expect_equal(cudaFree(nullptr), cudaSuccess, "cudaFree of nothing");
  cudaStreamDestroy(stream);
  cudaGetLastError();
}

void check_launches() {
  cudaLaunchConfig_t config = config_of(nullptr, 1, 1025);
  expect_equal(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidConfiguration, "1025 threads");
  config = config_of(nullptr, 0, 32);
  expect_equal(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidConfiguration, "no blocks");
  config = config_of(nullptr, 1, 32, 49153);
  expect_equal(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidValue, "more than 48 KiB without asking");
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 512, 60000);
  expect_equal(blocks, 0, "blocks that fit");
  const cudaFuncAttribute most_shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect_equal(cudaFuncSetAttribute(nothing, most_shared, 232449), cudaErrorInvalidValue, "too much shared memory");
  expect_equal(cudaFuncSetAttribute(nothing, most_shared, 232448), cudaSuccess, "all of the shared memory");
  config.dynamicSmemBytes = 232448;
  expect_equal(cudaLaunchKernelEx(&config, nothing), cudaSuccess, "all of the shared memory");
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, 512, 60000);
  expect_equal(blocks, 1, "blocks that fit");
  cudaFuncAttributes attributes;
  expect_equal(cudaFuncGetAttributes(&attributes, nothing), cudaSuccess, "cudaFuncGetAttributes");
  expect_equal(attributes.maxDynamicSharedSizeBytes, 232448, "maxDynamicSharedSizeBytes");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config = config_of(nullptr, 17, 32);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  expect_equal(cudaLaunchKernelEx(&config, nothing), cudaErrorCooperativeLaunchTooLarge, "17 blocks together");
  cudaGetLastError();
}

void check_device() {
  int value = -1;
  expect(cudaGetDeviceCount(&value) == cudaSuccess && value == 1, "cudaGetDeviceCount");
  expect(cudaGetDevice(&value) == cudaSuccess && value == 0, "cudaGetDevice");
  expect(cudaSetDevice(0) == cudaSuccess && cudaSetDevice(1) == cudaErrorInvalidDevice, "cudaSetDevice");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 16, "SMs");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && value == 232448,
         "shared memory");
  char id[32];
  expect_equal(cudaDeviceGetPCIBusId(id, sizeof id, 0), cudaSuccess, "cudaDeviceGetPCIBusId");
  expect_equal(std::string(cudaGetErrorName(cudaErrorCooperativeLaunchTooLarge)), "cudaErrorCooperativeLaunchTooLarge",
               "cudaGetErrorName");
  expect_equal(std::string(cudaGetErrorString(cudaSuccess)), "no error", "cudaGetErrorString");
  cudaGetLastError();
}

}  // namespace

void test_runtime() {
  check_order();
  check_sticky();
  check_copies();
  check_launches();
  check_device();
}

}  // namespace deep_a2a::emulator_test
