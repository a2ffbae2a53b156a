// The kernels, one block an SM.
#pragma once

#include "cuda/scales.hpp"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

// Two of each, for rows that there is one of for each rank, or for each expert: what is done once in a launch waits for
// its own instructions, and a kernel for both has half as many again.
__global__ void dispatch_rank_kernel(const __grid_constant__ Team team, const __grid_constant__ DispatchTask t);
__global__ void dispatch_expert_kernel(const __grid_constant__ Team team, const __grid_constant__ DispatchTask t);
__global__ void combine_rank_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t);
__global__ void combine_expert_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t);
__global__ void d7_column_scales_kernel(const __grid_constant__ ScalesTask t);
__global__ void release_kernel(const __grid_constant__ Team team, int slot);

}  // namespace deep_a2a::cuda
