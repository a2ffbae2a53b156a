// Puts with signals over the emulated NVSHMEM, in a job of one PE that puts to itself.
#include "cuda/network.cuh"

#include <nvshmem.h>
#include <unistd.h>

#include <cstring>

#include "emulator/nvshmem_job.hpp"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

constexpr int kChunks = 24;
constexpr int kChunkBytes = 4096;
constexpr int kRounds = 6;

struct Symmetric {
  uint64_t words[kChunks];
  uint64_t other_word;
  unsigned char out[kChunks][kChunkBytes];
  unsigned char in[kChunks][kChunkBytes];
};

// A warp for each chunk. Counts bytes that are wrong after the chunk's own signal, and chunks that others overtook.
__global__ void put_rounds(Symmetric* own, uint32_t* wrong, uint32_t* overtaken) {
  const int chunk = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint64_t round = 1; round <= kRounds; ++round) {
    for (int i = lane; i < kChunkBytes; i += 32) {
      own->out[chunk][i] = static_cast<unsigned char>(hash(static_cast<uint32_t>(chunk * 7919 + i + round * 104729)));
    }
    __syncwarp();
    cuda::put_signal_warp(own->in[chunk], own->out[chunk], kChunkBytes, &own->words[chunk], round, 0);
    if (lane == 0) {
      while (ptx::ld_acquire_sys(&own->words[chunk]) < round) {
      }
      for (int other = 0; other < chunk; ++other) {
        if (ptx::ld_acquire_sys(&own->words[other]) < round) atomicAdd(overtaken, 1u);
      }
    }
    __syncwarp();
    for (int i = lane; i < kChunkBytes; i += 32) {
      if (own->in[chunk][i] != own->out[chunk][i]) atomicAdd(wrong, 1u);
    }
    __syncthreads();
  }
}

__global__ void signal_at_once(Symmetric* own) {
  for (uint64_t value = 1; value < 200; ++value) cuda::remote_signal(&own->other_word, value, 0);
}

__global__ void change_source(Symmetric* own) {
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    cuda::put_signal_thread(own->in[chunk], own->out[chunk], kChunkBytes, &own->words[chunk], kRounds + 1, 0);
  }
  memset(own->out, 0x55, sizeof own->out);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    while (ptx::ld_acquire_sys(&own->words[chunk]) < kRounds + 1) {
    }
  }
  cuda::remote_signal(&own->other_word, 1000, 0);  // is told of it
}

__global__ void put_elsewhere(Symmetric* own, unsigned char* plain) {
  cuda::put_signal_thread(own->in[0], plain, 16, &own->words[0], 1000, 0);
}

// The network remembers what broke a rule until it gets another seed.
void expect_refused(cudaError_t error, const char* message) {
  expect(error == cudaErrorLaunchFailure, "a broken rule of puts has to fail the launch");
  expect(emulator::last_message().find(message) != std::string::npos, "expected \"", message, "\" in \"",
         emulator::last_message(), "\"");
}

}  // namespace

void test_network() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  int provided = 0;
  expect_equal(nvshmemx_get_uniqueid(&id), 0, "nvshmemx_get_uniqueid");
  nvshmemx_set_attr_uniqueid_args(0, 1, &id, &attributes);
  expect_equal(nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID, &attributes,
                                    {NVSHMEM_VENDOR_MAJOR_VERSION, 0, 0}),
               0, "nvshmemi_init_thread");
  auto* own = static_cast<Symmetric*>(nvshmem_malloc(sizeof(Symmetric)));
  expect(own != nullptr && nvshmem_ptr(own, 0) == own, "nvshmem_malloc, nvshmem_ptr");
  Array<uint32_t> wrong(1), overtaken(1);
  Array<unsigned char> plain(16);
  for (const std::optional<uint64_t> seed : {std::optional<uint64_t>(), std::optional<uint64_t>(1)}) {
    emulator::set_network_seed(seed);
    memset(own, 0, sizeof(Symmetric));
    wrong.fill(0);
    overtaken.fill(0);
    run_well(put_rounds, 1, kChunks * 32, 0, own, wrong.get(), overtaken.get());
    expect_equal(wrong[0], 0u, "bytes that came after their signal");
    expect(!seed || overtaken[0] > 0, "signals of a disturbed network overtake each other");
  }
  expect_refused(run(signal_at_once, 1, 1, 0, own), "two puts in flight");
  emulator::set_network_seed(2);
  expect_refused(run(change_source, 1, 1, 0, own), "source of a put was changed");
  emulator::set_network_seed(3);
  expect_refused(run(put_elsewhere, 1, 1, 0, own, plain.get()), "not in symmetric memory");
  emulator::set_network_seed({});
  nvshmem_finalize();
  expect_equal(nvshmemx_init_status(), int{NVSHMEM_STATUS_NOT_INITIALIZED}, "nvshmemx_init_status");
}

}  // namespace deep_a2a::emulator_test
