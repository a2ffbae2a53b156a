// One broken kernel for each mistake that the emulator has to report, and what its message must say.
#include <functional>

#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

constexpr size_t kShared = 4096;

struct Place {
  char* shared;
  uint64_t* barrier;  // at the start of shared memory, initialised for one arrival
  char* global;
};

// Runs one of the mistakes below; `mistake` is an address of this process.
using Mistake = void (*)(const Place&);

__global__ void make_mistake(Mistake mistake, char* global) {
  const Place place{ptx::dynamic_shared() + 128, reinterpret_cast<uint64_t*>(ptx::dynamic_shared()), global};
  if (threadIdx.x == 0) ptx::mbarrier_init(place.barrier, 1);
  __syncthreads();
  mistake(place);
}

bool first() { return threadIdx.x == 0; }

void wait_phase(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

struct Case {
  Mistake mistake;
  const char* message;
};

const Case kCases[] = {
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared, p.global, 24, p.barrier);
     },
     "bulk_load: bytes is 24"},
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared, p.global, 0, p.barrier);
     },
     "bulk_load: bytes is 0"},
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared + 8, p.global, 16, p.barrier);
     },
     "bulk_load: the shared address is"},
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared, p.global + 4, 16, p.barrier);
     },
     "bulk_load: the global address is"},
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared + kShared - 144, p.global, 32, p.barrier);
     },
     "which is offset 4080 of the 4096 bytes of shared memory of block 0"},
    {[](const Place& p) {
       if (first()) ptx::bulk_store(p.global, p.global, 32);
     },
     "bulk_store: 32 bytes at"},
    {[](const Place& p) {
       if (first()) ptx::bulk_store(p.global + 8, p.shared, 32);
     },
     "bulk_store: the global address is"},
    {[](const Place& p) {
       if (first()) ptx::bulk_store(p.global, p.shared, 40);
     },
     "bulk_store: bytes is 40"},
    {[](const Place& p) {
       if (first()) ptx::bulk_load(p.shared, p.global, 16, p.barrier + 1);
     },
     "bulk_load: the barrier at"},
    {[](const Place& p) { wait_phase(p.barrier + 2, 0); }, "mbarrier_try_wait: the barrier at"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_arrive(p.barrier + 3);
     },
     "is not initialised"},
    {[](const Place& p) {
       if (!first()) return;
       *p.barrier = 0;
       ptx::mbarrier_arrive(p.barrier);
     },
     "has been overwritten"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_init(p.barrier, 1);
     },
     "is initialised already"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_init(p.barrier + 1, 0);
     },
     "mbarrier_init: arrivals is 0"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_init(reinterpret_cast<uint64_t*>(p.global), 1);
     },
     "expected 8 aligned bytes of the block's dynamic shared memory"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_try_wait(p.barrier, 2);
     },
     "parity is 2, expected 0 or 1"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_arrive_expect_tx(p.barrier, 1 << 20);
     },
     "pending bytes become 1048576"},
    {[](const Place& p) {
       for (int i = 0; first() && i < 300; ++i) ptx::bulk_load(p.shared, p.global, 3840, p.barrier);
       while (true) ptx::mbarrier_try_wait(p.barrier, 0);
     },
     "pending bytes become -10"},
    {[](const Place& p) {
       if (!first()) return;
       ptx::mbarrier_arrive_expect_tx(p.barrier, 16);
       ptx::mbarrier_arrive(p.barrier);
     },
     "has all 1 arrivals of phase 0 and waits for 16 bytes"},
    {[](const Place& p) {
       if (first()) ptx::bulk_store(p.global, p.shared, 16);
     },
     "exits with bulk stores that it has not committed"},
    {[](const Place& p) {
       if (!first()) return;
       ptx::bulk_store(p.global, p.shared, 16);
       ptx::bulk_commit();
       ptx::bulk_wait_read<0>();
     },
     "exits with bulk stores whose bulk_wait has not come"},
    {[](const Place& p) { ptx::async_load<16>(p.shared, p.global + 8); }, "async_load: addresses are"},
    {[](const Place& p) { ptx::async_load<4>(p.shared + 2, p.global); }, "async_load: addresses are"},
    {[](const Place& p) { ptx::async_load<16>(p.shared + kShared - 136, p.global); },
     "which is not in the shared memory of block 0"},
    {[](const Place& p) { ptx::async_load<4>(p.shared, p.global); }, "exits with async loads that it has not waited"},
    {[](const Place& p) {
       if (!first()) return;
       ptx::mbarrier_arrive_expect_tx(p.barrier, 16);
       ptx::bulk_load(p.shared, p.global, 16, p.barrier);
     },
     "block 0: "},
    {[](const Place& p) { wait_phase(p.barrier, 0); }, "deadlock: no thread can go on"},
    {[](const Place& p) {
       if (first()) ptx::mbarrier_arrive_expect_tx(p.barrier, 32);
       if (first()) ptx::bulk_load(p.shared, p.global, 16, p.barrier);
       wait_phase(p.barrier, 0);
     },
     "in phase 0 waits for 0 of 1 arrivals and 16 bytes"},
    {[](const Place&) { ptx::named_barrier(1, 96); }, "64 threads in ptx::named_barrier"},
    {[](const Place&) { ptx::named_barrier(16, 64); }, "id is 16, expected 0 to 15"},
    {[](const Place&) { ptx::named_barrier(1, 40); }, "threads is 40"},
    {[](const Place&) {
       if (threadIdx.x < 32)
         __syncthreads();
       else
         ptx::named_barrier(0, 64);
     },
     "where others wait for"},
    {[](const Place&) {
       if (first()) __syncwarp(~1u);
     },
     "is without the caller's lane 0"},
    {[](const Place&) {
       if (first()) __shfl_sync(~0u, 1, 0, 3);
     },
     "width is 3"},
    {[](const Place&) {
       if (first())
         __syncwarp(3);
       else
         __syncwarp();
     },
     "which is in __syncwarp with mask"},
    {[](const Place&) {
       if (first())
         __any_sync(~0u, 1);
       else
         __all_sync(~0u, 1);
     },
     "_sync with mask 0xffffffff waits for lane"},
    {[](const Place& p) {
       if (first())
         p.global[0] = static_cast<char>(__syncthreads_or(0));
       else
         p.global[threadIdx.x] = static_cast<char>(__syncthreads_or(1) + 1);
     },
     "lanes of a warp call __syncthreads_or in different places"},
    {[](const Place&) {
       if (first())
         __syncwarp();
       else
         __syncthreads();
     },
     "deadlock: no thread can go on"},
    {[](const Place& p) {
       if (first()) p.shared[kShared - 128] = 1;
     },
     "wrote outside its 4096 bytes"},
    {[](const Place& p) {
       if (first()) ptx::shared_address(p.global);
     },
     "shared_address: "},
    {[](const Place&) {
       if (threadIdx.x == 33) __trap();
     },
     "block 0, thread 33: __trap"},
    {[](const Place& p) {
       while (ptx::ld_acquire_sys(reinterpret_cast<uint64_t*>(p.global + kShared)) == 0) {
       }
     },
     "nothing but polling for 0.3 s"},
};

}  // namespace

void test_failures() {
  emulator::set_idle_limit(0.3);
  Array<char> global(8192, 0);
  std::printf("  (messages of kernels that fail on purpose follow)\n");
  std::fflush(stdout);
  for (const Case& broken : kCases) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      emulator::set_seed(seed);
      const cudaError_t error = run(make_mistake, 1, 64, kShared, broken.mistake, global.get());
      expect(error == cudaErrorLaunchFailure, "a kernel that should fail with \"", broken.message, "\" ended with ",
             cudaGetErrorName(error));
      expect(emulator::last_message().find(broken.message) != std::string::npos, "expected \"", broken.message,
             "\", got \"", emulator::last_message(), "\"");
    }
  }
  emulator::set_idle_limit(600);
}

}  // namespace deep_a2a::emulator_test
