// Barriers of blocks, and how launches are divided into blocks.
#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

// Threads leave at different rounds; the others vote.
__global__ void votes(int* out, int num_rounds) {
  const int threads = static_cast<int>(blockDim.x), self = static_cast<int>(threadIdx.x);
  for (int round = 0; round < num_rounds; ++round) {
    if (self % num_rounds < round) return;
    const int predicate = static_cast<int>(hash(round * 1024 + self) % 4);
    int* to = out + (round * threads + self) * 3;
    to[0] = __syncthreads_count(predicate);
    to[1] = __syncthreads_and(predicate);
    to[2] = __syncthreads_or(predicate == 0);
  }
}

void check_votes(uint64_t seed) {
  constexpr int kThreads = 75, kRounds = 6;
  emulator::set_seed(seed);
  Array<int> out(kThreads * kRounds * 3);
  run_well(votes, 1, kThreads, 0, out.get(), kRounds);
  for (int round = 0; round < kRounds; ++round) {
    int present = 0, yes = 0;
    for (int self = 0; self < kThreads; ++self) {
      if (self % kRounds < round) continue;
      ++present;
      yes += hash(round * 1024 + self) % 4 != 0;
    }
    for (int self = 0; self < kThreads; ++self) {
      if (self % kRounds < round) continue;
      const int* seen = &out[static_cast<size_t>(round * kThreads + self) * 3];
      expect_equal(seen[0], yes, "__syncthreads_count, round ", round, " thread ", self);
      expect_equal(seen[1] != 0, yes == present, "__syncthreads_and, round ", round, " thread ", self);
      expect_equal(seen[2] != 0, yes != present, "__syncthreads_or, round ", round, " thread ", self);
    }
  }
}

// Each pair of warps passes a number to and fro through a cell of its own, with its own barrier.
__global__ void pairs(int* out, int num_rounds) {
  const int warp = threadIdx.x / 32, pair = warp / 2, lane = threadIdx.x % 32;
  int* cell = reinterpret_cast<int*>(ptx::dynamic_shared()) + pair * 32 + lane;
  int seen = 0;
  for (int round = 0; round < num_rounds * (pair + 1); ++round) {
    if (round % 2 == warp % 2) *cell = seen + 1;
    ptx::named_barrier(pair + 1, 64);
    seen = *cell;
    ptx::named_barrier(pair + 1, 64);
  }
  out[threadIdx.x] = seen;
}

__global__ void coordinates(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(out + block * threads + thread, 1);
}

// A compiler may make a loop of its own for either half of each warp: the barrier stays one.
__global__ void halves(int* out, int num_rounds) {
  const bool first_half = threadIdx.x % 32 < 16;
  int sum = 0;
  for (int round = 0; round < num_rounds; ++round) {
    if (first_half) {
      sum += round;
    } else {
      sum ^= round;
    }
    sum += __syncthreads_count(1);
  }
  out[threadIdx.x] = sum;
}

// A barrier of the grid, which holds only if all blocks are there at once.
__global__ void meet(unsigned* counter, uint32_t* result) {
  __syncthreads();
  if (threadIdx.x == 0) ptx::atom_add_acq_rel_gpu(counter, 1);
  while (ptx::ld_acquire_gpu(counter) < gridDim.x) {
  }
  atomicAdd(result, 1u);
}

}  // namespace

void test_blocks() {
  for (uint64_t seed = 0; seed < 20; ++seed) check_votes(seed);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    emulator::set_seed(seed);
    Array<int> out(256);
    run_well(pairs, 1, 256, 4096, out.get(), 10);
    for (int i = 0; i < 256; ++i) expect_equal(out[i], 10 * (i / 64 + 1), "pairs, thread ", i);
    Array<unsigned> counters(2);
    run_well(meet, 16, 64, 0, counters.get(), counters.get() + 1);
    expect_equal(counters[1], 16u * 64, "threads that met");
  }
  Array<int> sums(64);
  run_well(halves, 1, 64, 0, sums.get(), 5);
  for (int i = 0; i < 64; ++i) {
    int sum = 0;
    for (int round = 0; round < 5; ++round) sum = (i % 32 < 16 ? sum + round : sum ^ round) + 64;
    expect_equal(sums[i], sum, "sum of thread ", i);
  }
  Array<int> visits(3 * 7 * 2 * 5 * 3 * 2);
  run_well(coordinates, dim3(3, 7, 2), dim3(5, 3, 2), 0, visits.get());
  for (size_t i = 0; i < visits.size(); ++i) expect_equal(visits[i], 1, "visits of thread ", i);
}

}  // namespace deep_a2a::emulator_test
