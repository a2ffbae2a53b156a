// Kernels with a missing wait or barrier: some seed must bring wrong data, and none where nothing is missing.
#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

constexpr int kSeeds = 50;
constexpr int kInts = 64;
constexpr int kRows = 6;

enum class Mistake : int { kNone, kOne };

// One stage for all rows: the next row may be written only when the last one has been read.
__global__ void reuse_stage(int* out, Mistake mistake) {
  auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared());
  for (int row = 0; row < kRows; ++row) {
    for (int i = threadIdx.x; i < kInts; i += 32) stage[i] = row * kInts + i;
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x == 0) {
      ptx::bulk_store(out + row * kInts, stage, kInts * 4);
      ptx::bulk_commit();
      if (mistake == Mistake::kNone) ptx::bulk_wait_read<0>();
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) ptx::bulk_wait<0>();
}

// Block 0 stores and signals, block 1 copies what it finds then.
__global__ void signal_stored(int* out, int* data, uint64_t* flag, Mistake mistake) {
  if (blockIdx.x == 0) {
    auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared());
    for (int i = threadIdx.x; i < kInts; i += 32) stage[i] = i;
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x != 0) return;
    ptx::bulk_store(data, stage, kInts * 4);
    ptx::bulk_commit();
    if (mistake == Mistake::kNone) {
      ptx::bulk_wait<0>();
    } else {
      ptx::bulk_wait_read<0>();
    }
    ptx::st_release_sys(flag, 1);
    ptx::bulk_wait<0>();
  } else {
    while (ptx::ld_acquire_sys(flag) == 0) {
    }
    for (int i = threadIdx.x; i < kInts; i += 32) out[i] = data[i];
  }
}

// Half of the bytes are expected: the phase may end before all have come.
__global__ void expect_half(int* out, const int* in, Mistake mistake) {
  auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared() + 128);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_arrive_expect_tx(barrier, mistake == Mistake::kNone ? kInts * 4 : kInts * 2);
    ptx::bulk_load(stage, in, kInts * 2, barrier);
    ptx::bulk_load(stage + kInts / 2, in + kInts / 2, kInts * 2, barrier);
  }
  __syncthreads();
  while (!ptx::mbarrier_try_wait(barrier, 0)) {
  }
  for (int i = threadIdx.x; i < kInts; i += 32) out[i] = stage[i];
}

// A stage is loaded again while lanes may still read it.
__global__ void load_early(int* out, const int* in, Mistake mistake) {
  auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared() + 128);
  const int lane = threadIdx.x;
  if (lane == 0) ptx::mbarrier_init(barrier, 1);
  __syncwarp();
  for (int row = 0; row < kRows; ++row) {
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(barrier, 128);
      ptx::bulk_load(stage, in + row * 32, 128, barrier);
    }
    while (!ptx::mbarrier_try_wait(barrier, row % 2)) {
    }
    out[row * 32 + lane] = stage[lane];
    if (mistake == Mistake::kNone) __syncwarp();
  }
}

enum class Missing : int { kNothing, kWait, kSyncBehind, kSyncBefore };

// Each lane loads a few bytes, its neighbour reads them.
__global__ void pass_on_loaded(int* out, const int* in, Missing missing) {
  auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared());
  const int lane = threadIdx.x, next = (lane + 1) % 32;
  for (int row = 0; row < kRows; ++row) {
    ptx::async_load<4>(stage + lane, in + row * 32 + lane);
    if (missing != Missing::kWait) ptx::async_wait();
    if (missing != Missing::kSyncBehind) __syncwarp();
    out[row * 32 + next] = stage[next];
    if (missing != Missing::kSyncBefore) __syncwarp();
  }
  ptx::async_wait();
}

// A lane writes, its neighbour reads.
__global__ void pass_on(int* out, Mistake mistake) {
  auto* cells = reinterpret_cast<int*>(ptx::dynamic_shared());
  cells[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (mistake == Mistake::kNone) __syncthreads();
  out[threadIdx.x] = cells[(threadIdx.x + 1) % blockDim.x];
}

// Who comes when.
__global__ void queue_up(uint32_t* order, uint32_t* next) {
  for (int round = 0; round < 4; ++round) {
    order[atomicAdd(next, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
    __syncwarp();
  }
}

std::vector<uint32_t> order_of(uint64_t seed) {
  constexpr int kThreads = 128;
  emulator::set_seed(seed);
  Array<uint32_t> order(2 * kThreads * 4), next(1);
  run_well(queue_up, 2, kThreads, 0, order.get(), next.get());
  return {order.get(), order.get() + order.size()};
}

void check_repeatable() {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const std::vector<uint32_t> order = order_of(seed);
    expect(order == order_of(seed), "seed ", seed, " gives two schedules");
    expect(order != order_of(seed + 1), "seeds ", seed, " and ", seed + 1, " give the same schedule");
  }
}

enum class Expected : int { kAscending, kNext };

// How many of the seeds bring wrong data, or a failure.
template <class Launch>
int count_wrong(int size, Expected expected, Launch&& launch) {
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(static_cast<uint64_t>(seed));
    Array<int> out(static_cast<size_t>(size), -1);
    bool same = launch(out.get()) == cudaSuccess;
    for (int i = 0; i < size; ++i) same = same && out[i] == (expected == Expected::kAscending ? i : (i + 1) % size);
    wrong += same ? 0 : 1;
  }
  return wrong;
}

template <class Launch>
void check(const char* what, int size, Expected expected, Launch&& launch) {
  const int well = count_wrong(size, expected, [&](int* out) { return launch(out, Mistake::kNone); });
  const int badly = count_wrong(size, expected, [&](int* out) { return launch(out, Mistake::kOne); });
  expect_equal(well, 0, what, ": wrong runs without the mistake");
  expect(badly > 0, what, ": the mistake has no effect in ", kSeeds, " seeds");
  std::printf("  %s: found by %d of %d seeds\n", what, badly, kSeeds);
}

}  // namespace

void test_races() {
  check_repeatable();
  Array<int> in(kRows * kInts), data(kInts);
  Array<uint64_t> flag(1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  check("a stage written before it was read", kRows * kInts, Expected::kAscending,
        [&](int* out, Mistake mistake) { return run(reuse_stage, 1, 32, 1024, out, mistake); });
  check("a signal before bulk_wait", kInts, Expected::kAscending, [&](int* out, Mistake mistake) {
    flag.fill(0);
    data.fill(-1);
    return run(signal_stored, 2, 32, 1024, out, data.get(), flag.get(), mistake);
  });
  check("half of the bytes expected", kInts, Expected::kAscending,
        [&](int* out, Mistake mistake) { return run(expect_half, 1, 32, 1024, out, in.get(), mistake); });
  check("a load without __syncwarp before it", kRows * 32, Expected::kAscending,
        [&](int* out, Mistake mistake) { return run(load_early, 1, 32, 1024, out, in.get(), mistake); });
  const auto check_loaded = [&](const char* what, Missing missing) {
    check(what, kRows * 32, Expected::kAscending, [&](int* out, Mistake mistake) {
      return run(pass_on_loaded, 1, 32, 1024, out, in.get(), mistake == Mistake::kNone ? Missing::kNothing : missing);
    });
  };
  check_loaded("async loads without a wait", Missing::kWait);
  check_loaded("async loads without __syncwarp behind them", Missing::kSyncBehind);
  check_loaded("async loads without __syncwarp before them", Missing::kSyncBefore);
  check("a missing __syncthreads", 128, Expected::kNext,
        [&](int* out, Mistake mistake) { return run(pass_on, 1, 128, 1024, out, mistake); });
}

}  // namespace deep_a2a::emulator_test
