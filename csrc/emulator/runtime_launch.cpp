// The part of the runtime API that is about kernels.
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cuda_runtime.h"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"
#include "emulator/runtime_error.hpp"
#include "emulator/stream.hpp"

namespace deep_a2a::emulator {
namespace {

struct SharedLimits {
  std::mutex mutex;
  std::unordered_map<const void*, size_t> by_function;
};

SharedLimits& shared_limits() {
  static SharedLimits& instance = *new SharedLimits;
  return instance;
}

size_t shared_limit(const void* function) {
  const std::lock_guard<std::mutex> lock(shared_limits().mutex);
  const auto set = shared_limits().by_function.find(function);
  return set == shared_limits().by_function.end() ? kDefaultSharedBytes : set->second;
}

uint64_t volume(const dim3& shape) { return uint64_t{shape.x} * shape.y * shape.z; }

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* function) {
  if (function == nullptr) return cudaErrorInvalidDeviceFunction;
  if (volume(config.gridDim) == 0 || volume(config.blockDim) == 0) return cudaErrorInvalidConfiguration;
  if (volume(config.blockDim) > kMaxBlockThreads) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > shared_limit(function)) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0 &&
        volume(config.gridDim) > kNumSms) {
      return cudaErrorCooperativeLaunchTooLarge;
    }
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z != 1) {
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* function, std::function<void()> body) {
  const cudaError_t refused = check_launch(config, function);
  if (refused != cudaSuccess) return remember(refused);
  const LaunchShape shape{config.gridDim, config.blockDim, config.dynamicSmemBytes};
  const uint64_t seed = seed_of_next_launch();
  return remember(submit(config.stream, [shape, seed, body = std::move(body)] {
    try {
      Launch(shape, body, seed).run();
      return cudaSuccess;
    } catch (const std::exception& error) {
      report_failure(error.what());
      return cudaErrorLaunchFailure;
    }
  }));
}

}  // namespace deep_a2a::emulator

using deep_a2a::emulator::remember;

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (function == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  const bool fits = value >= 0 && static_cast<size_t>(value) <= deep_a2a::emulator::kMaxSharedBytes;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || !fits) return remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(deep_a2a::emulator::shared_limits().mutex);
  deep_a2a::emulator::shared_limits().by_function[function] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (attributes == nullptr) return remember(cudaErrorInvalidValue);
  if (function == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = deep_a2a::emulator::kMaxBlockThreads;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(deep_a2a::emulator::shared_limit(function));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int block_threads,
                                                          size_t shared_bytes) {
  if (blocks == nullptr || block_threads <= 0) return remember(cudaErrorInvalidValue);
  if (function == nullptr) return remember(cudaErrorInvalidDeviceFunction);
  const bool fits = static_cast<unsigned>(block_threads) <= deep_a2a::emulator::kMaxBlockThreads &&
                    shared_bytes <= deep_a2a::emulator::shared_limit(function);
  *blocks = fits ? 1 : 0;
  return cudaSuccess;
}
