// The kernels, one block an SM.
#pragma once

#include "cuda/scales.hpp"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

__global__ void dispatch_kernel(const __grid_constant__ Team team, const __grid_constant__ DispatchTask t);
__global__ void combine_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t);
__global__ void scales_kernel(const __grid_constant__ ScalesTask t);
__global__ void release_kernel(const __grid_constant__ Team team, int slot);

}  // namespace deep_a2a::cuda
