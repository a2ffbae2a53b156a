// The last error of a thread, as the runtime API keeps it.
#pragma once

#include "cuda_runtime_api.h"

namespace deep_a2a::emulator {

// Every function of the API returns through this.
cudaError_t remember(cudaError_t error);

}  // namespace deep_a2a::emulator
