// Ranks as processes, whose kernels talk through device memory that they have opened from each other.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>

#include "cuda/ptx.cuh"
#include "emulator/shared_memory.hpp"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

constexpr int kRanks = 3;
constexpr int kRounds = 30;
constexpr int kRowInts = 128;

// In every rank: a flag and a row from each rank.
struct Window {
  uint64_t flags[kRanks];
  uint64_t taken[kRanks];  // set by the readers
  alignas(128) int rows[kRanks][kRowInts];
};

struct Peers {
  Window* windows[kRanks];
};

// One warp for each peer: sends a row a round, and takes the peer's.
__global__ void exchange(const __grid_constant__ Peers peers, int rank, uint32_t* wrong) {
  const int peer = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* stage = reinterpret_cast<int*>(ptx::dynamic_shared()) + peer * kRowInts;
  Window& own = *peers.windows[rank];
  Window& other = *peers.windows[peer];
  for (uint64_t round = 1; round <= kRounds; ++round) {
    for (int i = lane; i < kRowInts; i += 32) stage[i] = static_cast<int>(round * 1000000 + rank * 1000 + i);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
      while (ptx::ld_acquire_sys(&own.taken[peer]) + 1 < round) {
      }
      ptx::bulk_store(other.rows[rank], stage, kRowInts * 4);
      ptx::bulk_commit();
      ptx::bulk_wait<0>();
      ptx::st_release_sys(&other.flags[rank], round);
      while (ptx::ld_acquire_sys(&own.flags[peer]) < round) {
      }
    }
    __syncwarp();
    for (int i = lane; i < kRowInts; i += 32) {
      if (own.rows[peer][i] != static_cast<int>(round * 1000000 + peer * 1000 + i)) atomicAdd(wrong, 1u);
    }
    __syncwarp();
    if (lane == 0) ptx::st_release_sys(&other.taken[rank], round);
  }
}

struct Board {
  std::atomic<int> arrived;
  cudaIpcMemHandle_t handles[kRanks];
  cudaIpcMemHandle_t freed;
};

void meet(Board& board, int count) {
  ++board.arrived;
  for (int i = 0; board.arrived < count && i < 60000; ++i) usleep(1000);
  expect(board.arrived >= count, "another rank has not come");
}

void run_rank(Board& board, int rank) {
  emulator::set_seed(static_cast<uint64_t>(rank));
  Window* own = nullptr;
  int* extra = nullptr;
  expect_equal(cudaMalloc(&own, sizeof(Window)), cudaSuccess, "cudaMalloc");
  expect_equal(cudaMalloc(&extra, 4096), cudaSuccess, "cudaMalloc");
  memset(own, 0, sizeof(Window));
  expect_equal(cudaIpcGetMemHandle(&board.handles[rank], own->rows), cudaSuccess, "cudaIpcGetMemHandle");
  void* opened = nullptr;
  expect_equal(cudaIpcOpenMemHandle(&opened, board.handles[rank], 0), cudaErrorDeviceUninitialized, "an own handle");
  if (rank == 0) expect_equal(cudaIpcGetMemHandle(&board.freed, extra), cudaSuccess, "cudaIpcGetMemHandle");
  expect_equal(cudaFree(extra), cudaSuccess, "cudaFree");
  meet(board, kRanks);
  if (rank != 0) expect_equal(cudaIpcOpenMemHandle(&opened, board.freed, 0), cudaErrorInvalidValue, "a freed handle");
  Peers peers{};
  peers.windows[rank] = own;
  for (int peer = 0; peer < kRanks; ++peer) {
    if (peer == rank) continue;
    void* again = nullptr;
    expect_equal(cudaIpcOpenMemHandle(&opened, board.handles[peer], cudaIpcMemLazyEnablePeerAccess), cudaSuccess,
                 "open");
    expect_equal(cudaIpcOpenMemHandle(&again, board.handles[peer], 0), cudaSuccess, "open again");
    expect_equal(again, opened, "the address of a handle that was opened twice");
    expect_equal(cudaIpcCloseMemHandle(again), cudaSuccess, "close");
    peers.windows[peer] = static_cast<Window*>(opened);
  }
  Array<uint32_t> wrong(1);
  run_well(exchange, 1, kRanks * 32, kRanks * kRowInts * 4, peers, rank, wrong.get());
  expect_equal(wrong[0], 0u, "wrong values at rank ", rank);
  meet(board, 2 * kRanks);
  for (int peer = 0; peer < kRanks; ++peer) {
    if (peer != rank) expect_equal(cudaIpcCloseMemHandle(peers.windows[peer]), cudaSuccess, "close");
  }
  expect_equal(cudaIpcCloseMemHandle(own), cudaErrorInvalidValue, "closing memory that was not opened");
  expect_equal(cudaFree(own), cudaSuccess, "cudaFree");
}

// How a process ends that reads so far behind its shared memory.
int status_after_reading(size_t offset) {
  const pid_t child = fork();
  if (child == 0) {
    const emulator::SharedMemory memory(256);
    const volatile char* data = memory.data();
    _exit(data[256 + offset] == 0 ? 1 : 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace

void test_processes() {
  const int near = status_after_reading(1023), far = status_after_reading(1024);
  expect(WIFEXITED(near) && WEXITSTATUS(near) == 0, "a read within the margin ended with status ", near);
  expect(WIFSIGNALED(far) && WTERMSIG(far) == SIGSEGV, "a read behind the margin ended with status ", far);

  void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto& board = *new (memory) Board{};
  pid_t children[kRanks];
  for (int rank = 0; rank < kRanks; ++rank) {
    children[rank] = fork();
    if (children[rank] != 0) continue;
    run_rank(board, rank);
    std::fflush(stdout);
    _exit(num_failures == 0 ? 0 : 1);
  }
  for (int rank = 0; rank < kRanks; ++rank) {
    int status = -1;
    waitpid(children[rank], &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank ", rank, " ended with status ", status);
  }
  munmap(memory, sizeof(Board));
}

}  // namespace deep_a2a::emulator_test
