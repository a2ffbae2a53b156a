// What combine's rings are made of and nothing else: one warp loads into stages by bulk copies, another reads them,
// with a full and an empty mbarrier for each stage. `compute-sanitizer --tool racecheck` reports hazards of it, so that
// its reports of that kind say nothing about the kernels.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -o /tmp/ring tests/cpp/ring.cu
//   compute-sanitizer --tool racecheck /tmp/ring
#include <cstdint>
#include <cstdio>

#include "cuda/ptx.cuh"

namespace ptx = deep_a2a::cuda::ptx;

constexpr int kStages = 4, kLanes = 32, kBytes = kLanes * 16, kPieces = 64;

__device__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

__global__ void ring(const uint4* in, uint4* out) {
  __shared__ alignas(128) char stages[kStages][kBytes];
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool loads = static_cast<int>(threadIdx.x) < kLanes;
  for (int piece = 0; piece < kPieces; ++piece) {
    const int stage = piece % kStages;
    const uint32_t parity = piece / kStages % 2;
    if (!loads) {
      wait(full + stage, parity);
      out[piece * kLanes + lane] = reinterpret_cast<const uint4*>(stages[stage])[lane];
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty + stage);
    } else if (lane == 0) {
      wait(empty + stage, parity ^ 1);
      ptx::fence_proxy_async_shared();
      ptx::mbarrier_arrive_expect_tx(full + stage, kBytes);
      ptx::bulk_load(stages[stage], in + piece * kLanes, kBytes, full + stage);
    }
  }
}

int main() {
  uint4 *in = nullptr, *out = nullptr, host[kPieces * kLanes];
  cudaMalloc(&in, sizeof(host));
  cudaMalloc(&out, sizeof(host));
  cudaMemset(in, 0x5A, sizeof(host));
  ring<<<1, 2 * kLanes>>>(in, out);
  const cudaError_t status = cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (const uint4& value : host) wrong += value.x != 0x5A5A5A5Au || value.w != 0x5A5A5A5Au ? 1 : 0;
  std::printf("%s, %d wrong\n", cudaGetErrorString(status), wrong);
  return wrong == 0 && status == cudaSuccess ? 0 : 1;
}
