// An emulator of CUDA on the CPU. Kernels and host code compile with g++ against this folder's headers in place of
// CUDA's:
//   g++ -std=c++17 -ffp-contract=off -pthread -Wno-unknown-pragmas -I csrc/emulator -I csrc
// with `-x c++ -include cuda_runtime.h` for .cu files, where nvcc includes it by itself.
//
// Every CUDA thread is a fiber. A kernel runs on the OS thread of its stream, its threads in random order; the seed is
// emulator::set_seed() or the environment variable DEEP_A2A_EMULATOR_SEED (emulator/control.hpp). Device memory is
// shared memory that other processes can open by IPC handle, so ranks that are processes run kernels that talk to each
// other.
//
// Faithful: partial masks and divergent warps; barriers that count threads which have not exited; the phases, arrivals
// and bytes of mbarriers; bulk copies, which read and write late, in pieces and in any order that PTX allows; the order
// of work in streams; up to 16 blocks at once, one for each SM.
//
// Reported as the launch's failure (message to stderr, emulator::last_message(), cudaErrorLaunchFailure from the stream
// ever after): wrong alignment or size of bulk copies, shared addresses outside the block's memory, mbarriers that are
// not initialised, arrive too often or count too many bytes, stores outside shared memory (at the end, near its
// borders), copies that nobody waited for, warps whose threads wait for each other, or for the block, in different
// calls, deadlocks.
//
// Not faithful:
// - Fences between proxies are not checked, and ordinary memory is as strongly ordered as the CPU's.
// - Threads are switched only in calls of CUDA functions, so two plain accesses in a row are never torn apart.
// - A thread never runs beside another of its launch.
// - The null stream runs work at once in the caller and waits for nothing.
// - Only the stream of a failed kernel fails, and those that wait for its events, not the whole device.
// - Allocations of up to 16 MiB come poisoned, larger ones zeroed.
#pragma once

#include <functional>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulator/intrinsics.hpp"

namespace deep_a2a::emulator {

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* function, std::function<void()> body);

}  // namespace deep_a2a::emulator

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  auto body = [kernel, params = std::tuple<Params...>(std::forward<Args>(args)...)] { std::apply(kernel, params); };
  return deep_a2a::emulator::launch_kernel(*config, reinterpret_cast<const void*>(kernel), std::move(body));
}

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaHostAlloc(T** pointer, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <class T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned flags) {
  return cudaHostGetDevicePointer(reinterpret_cast<void**>(device), host, flags);
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* function, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* function) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(function));
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* function, int block_threads,
                                                          size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(function), block_threads,
                                                       shared_bytes);
}
