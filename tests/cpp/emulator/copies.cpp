// Bulk copies through rings of stages in shared memory, correct under every schedule.
#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

constexpr int kRowBytes = 208;

// Each warp copies its rows through its ring: one lane loads ahead, all lanes add 1 in place, some lanes store.
__global__ void ring(char* out, char* more, const char* in, int rows_per_warp, int num_stages) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared()) + warp * num_stages;
  char* stages = ptx::dynamic_shared() + 1024 + warp * num_stages * kRowBytes;
  if (lane == 0) {
    for (int stage = 0; stage < num_stages; ++stage) ptx::mbarrier_init(full + stage, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  const int64_t first = (int64_t{blockIdx.x} * num_warps + warp) * rows_per_warp;
  const auto load = [&](int row) {
    if (lane != 0 || row >= rows_per_warp) return;
    uint64_t* barrier = full + row % num_stages;
    char* to = stages + row % num_stages * kRowBytes;
    ptx::mbarrier_arrive_expect_tx(barrier, kRowBytes);  // by two copies
    ptx::bulk_load(to, in + (first + row) * kRowBytes, 160, barrier);
    ptx::bulk_load(to + 160, in + (first + row) * kRowBytes + 160, kRowBytes - 160, barrier);
  };
  for (int row = 0; row == 0 || row + 1 < num_stages; ++row) load(row);
  for (int row = 0; row < rows_per_warp; ++row) {
    const int stage = row % num_stages;
    while (!ptx::mbarrier_try_wait(full + stage, row / num_stages % 2)) {
    }
    char* data = stages + stage * kRowBytes;
    for (int i = lane; i < kRowBytes; i += 32) ++data[i];
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane < 2) ptx::bulk_store((lane == 0 ? out : more) + (first + row) * kRowBytes, data, kRowBytes);
    ptx::bulk_commit();
    if (num_stages == 1) {
      ptx::bulk_wait_read<0>();
    } else {
      ptx::bulk_wait_read<1>();
    }
    __syncwarp();
    load(num_stages == 1 ? row + 1 : row + num_stages - 1);
  }
  ptx::bulk_wait<0>();
}

void check_ring(uint64_t seed) {
  constexpr int kBlocks = 2, kWarps = 4, kRows = 13;
  constexpr size_t kBytes = size_t{kBlocks} * kWarps * kRows * kRowBytes;
  emulator::set_seed(seed);
  Array<char> in(kBytes), out(kBytes), more(kBytes);
  for (size_t i = 0; i < kBytes; ++i) in[i] = static_cast<char>(hash(static_cast<uint32_t>(i)));
  const int num_stages = 1 + static_cast<int>(seed % 4);
  run_well(ring, kBlocks, kWarps * 32, 1024 + kWarps * num_stages * kRowBytes, out.get(), more.get(), in.get(), kRows,
           num_stages);
  size_t wrong = 0;
  for (size_t i = 0; i < kBytes; ++i) {
    const char expected = static_cast<char>(in[i] + 1);
    wrong += out[i] != expected || more[i] != expected;
  }
  expect_equal(wrong, 0u, "wrong bytes of a ring of ", num_stages, " stages with seed ", seed);
}

// A warp that loads and a warp that adds, with barriers for both directions; the sum needs every row once.
__global__ void producer_consumer(const int* in, int* sums, int num_rows) {
  constexpr int kStages = 3, kInts = 32;
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  auto* empty = full + kStages;
  auto* data = reinterpret_cast<int*>(ptx::dynamic_shared() + 128);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int sum = 0;
  for (int row = 0; row < num_rows; ++row) {
    const int stage = row % kStages;
    const uint32_t parity = row / kStages % 2;
    if (threadIdx.x < 32) {
      while (!ptx::mbarrier_try_wait(full + stage, parity)) {
      }
      sum += data[stage * kInts + lane];
      ptx::mbarrier_arrive(empty + stage);
    } else if (lane == 0) {
      while (!ptx::mbarrier_try_wait(empty + stage, parity ^ 1)) {
      }
      ptx::mbarrier_arrive_expect_tx(full + stage, kInts * 4);
      ptx::bulk_load(data + stage * kInts, in + row * kInts, kInts * 4, full + stage);
    }
  }
  if (threadIdx.x < 32) sums[lane] = sum;
}

void check_producer_consumer(uint64_t seed) {
  constexpr int kRows = 50;
  emulator::set_seed(seed);
  Array<int> in(kRows * 32), sums(32);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(hash(static_cast<uint32_t>(i)) % 1000);
  run_well(producer_consumer, 1, 64, 1024, in.get(), sums.get(), kRows);
  for (int lane = 0; lane < 32; ++lane) {
    int expected = 0;
    for (int row = 0; row < kRows; ++row) expected += in[row * 32 + lane];
    expect_equal(sums[lane], expected, "sum of lane ", lane, " with seed ", seed);
  }
}

}  // namespace

void test_copies() {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    check_ring(seed);
    check_producer_consumer(seed);
  }
}

}  // namespace deep_a2a::emulator_test
