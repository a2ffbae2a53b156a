// Launches of the kernels: the border between host code and device code.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/scales.hpp"
#include "cuda/task.hpp"

namespace deep_a2a::cuda {

struct Launch {
  cudaStream_t stream = nullptr;
  int num_sms = 0;  // blocks, one for each SM: all have to be resident
};

// What a block on this device may take; lets the kernels take it.
DeviceLimits prepare_kernels(int device);

void launch_dispatch(const Launch& launch, const Team& team, const DispatchTask& task);
void launch_combine(const Launch& launch, const Team& team, const CombineTask& task);
// Behind the receive half of a dispatch; these blocks need not be resident together.
void launch_scales(const Launch& launch, const ScalesTask& task);
// The lease of a slot is over.
void launch_release(cudaStream_t stream, const Team& team, int slot);

}  // namespace deep_a2a::cuda
