#include <cuda_runtime.h>

#include "cuda/api.hpp"
#include "cuda/kernels.cuh"
#include "cuda/launch.hpp"

namespace deep_a2a::cuda {
namespace {

// As many bytes as all drivers take.
constexpr size_t kMostParameterBytes = 4096;
static_assert(sizeof(Team) + sizeof(DispatchTask) <= kMostParameterBytes);
static_assert(sizeof(Team) + sizeof(CombineTask) <= kMostParameterBytes);

template <class Kernel>
void allow_shared_memory(Kernel* kernel, const DeviceLimits& limits) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
             "cudaFuncSetAttribute (does this build have code for the device?)");
}

template <class... Params, class... Args>
void launch_kernel(void (*kernel)(Params...), const Launch& launch, int threads, int shared_bytes,
                   const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_sms));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = launch.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "the launch of a kernel");
}

}  // namespace

DeviceLimits prepare_kernels(int device) {
  DeviceLimits limits;
  int major = 0;
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  };
  read(limits.num_sms, cudaDevAttrMultiProcessorCount);
  read(limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(major, cudaDevAttrComputeCapabilityMajor);
  check_argument(major >= 9, "device ", device, " has compute capability ", major, ", expected at least 9 (Hopper)");
  allow_shared_memory(dispatch_rank_kernel, limits);
  allow_shared_memory(dispatch_expert_kernel, limits);
  allow_shared_memory(combine_rank_kernel, limits);
  allow_shared_memory(combine_expert_kernel, limits);
  allow_shared_memory(d7_column_scales_kernel, limits);
  cudaFuncAttributes loaded{};  // to load a kernel later may have to wait for those that run
  check_cuda(cudaFuncGetAttributes(&loaded, release_kernel), "cudaFuncGetAttributes");
  return limits;
}

void launch_dispatch(const Launch& launch, const Team& team, const DispatchTask& task) {
  const auto kernel = rows_per(team.shape) == RowsPer::kRank ? dispatch_rank_kernel : dispatch_expert_kernel;
  launch_kernel(kernel, launch, kBlockThreads, task.plan.shared_bytes, team, task);
}

void launch_combine(const Launch& launch, const Team& team, const CombineTask& task) {
  const auto kernel = rows_per(team.shape) == RowsPer::kRank ? combine_rank_kernel : combine_expert_kernel;
  launch_kernel(kernel, launch, kBlockThreads, task.plan.shared_bytes, team, task);
}

void launch_scales(const Launch& launch, const ScalesTask& task) {
  launch_kernel(d7_column_scales_kernel, launch, kScaleThreads, kScaleThreads / kWarpThreads * kScalePieceBytes, task);
}

void launch_release(cudaStream_t stream, const Team& team, int slot) {
  launch_kernel(release_kernel, {stream, 1}, kMaxRanksPerNode, 0, team, slot);
}

}  // namespace deep_a2a::cuda
