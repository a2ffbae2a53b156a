// The part of NVSHMEM that the kernels and their host side use, over processes of one host. Symmetric memory is the
// emulator's device memory, which peers open by IPC handle.
//
// With a seed (emulator::set_network_seed) every put comes late, in pieces and in any order, as csrc/cpu/network.hpp
// delivers; without one it is done at once. Processes that give different names in NVSHMEM_FAKE_HOST are on different
// nodes: memory is mapped between processes of one node alone.
//
// Reported, as a failure of the launch that puts next: a second put in flight for a word, and a source that was changed
// before its bytes had arrived. Not faithful: nothing is delivered in a stream's or a queue pair's order, a PE may put
// to itself, and collective calls end with an error after the emulator's idle limit rather than never.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define NVSHMEM_EMULATED 1

#define NVSHMEM_VENDOR_MAJOR_VERSION 3
#define NVSHMEM_VENDOR_MINOR_VERSION 4
#define NVSHMEM_VENDOR_PATCH_VERSION 5

struct nvshmemx_uniqueid_t {
  int version;
  char internal[124];
};
struct nvshmemx_uniqueid_args_t {
  int version;
  nvshmemx_uniqueid_t* id;
  int myrank;
  int nranks;
};
struct nvshmemx_init_args_t {
  int version;
  nvshmemx_uniqueid_args_t uid_args;
};
struct nvshmemx_init_attr_t {
  int version;
  void* mpi_comm;
  nvshmemx_init_args_t args;
};
struct nvshmemi_version_t {
  int major, minor, patch;
};
#define NVSHMEMX_UNIQUEID_INITIALIZER \
  {                                   \
  }
#define NVSHMEMX_INIT_ATTR_INITIALIZER \
  {                                    \
  }

constexpr unsigned NVSHMEMX_INIT_WITH_UNIQUEID = 1u << 3;
constexpr int NVSHMEM_THREAD_SERIALIZED = 2;
constexpr int NVSHMEM_SIGNAL_SET = 9;
constexpr int NVSHMEM_CMP_GE = 4;
enum { NVSHMEM_STATUS_NOT_INITIALIZED = 0, NVSHMEM_STATUS_IS_BOOTSTRAPPED, NVSHMEM_STATUS_IS_INITIALIZED };
enum { NVSHMEMI_PROXY_FULL = 2 };
enum { NVSHMEMI_JOB_GPU_LDST_ATOMICS = 1, NVSHMEMI_JOB_GPU_PROXY_CST = 16 };

struct nvshmemi_device_host_state_t {
  int proxy;
  int job_connectivity;
  bool ibgda_is_initialized;
};
constexpr nvshmemi_device_host_state_t nvshmemi_device_state_d{NVSHMEMI_PROXY_FULL, NVSHMEMI_JOB_GPU_LDST_ATOMICS,
                                                               false};
inline cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                        cudaMemcpyKind kind) {
  return cudaMemcpy(to, static_cast<const char*>(symbol) + offset, bytes, kind);
}

// For the host.
int nvshmemx_init_status();
int nvshmemx_get_uniqueid(nvshmemx_uniqueid_t* id);
int nvshmemx_set_attr_uniqueid_args(int rank, int num_ranks, const nvshmemx_uniqueid_t* id, nvshmemx_init_attr_t* attr);
int nvshmemi_init_thread(int requested, int* provided, unsigned flags, nvshmemx_init_attr_t* attr, nvshmemi_version_t);
void nvshmem_finalize();
void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch);
void* nvshmem_malloc(size_t bytes);
void nvshmemx_quiet_on_stream(cudaStream_t stream);

// For both.
int nvshmem_my_pe();
int nvshmem_n_pes();
void* nvshmem_ptr(const void* symmetric, int pe);

// For kernels.
void nvshmem_putmem_signal_nbi(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value, int operation,
                               int pe);
void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value,
                                     int operation, int pe);
void nvshmemx_putmem_signal_nbi_block(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value,
                                      int operation, int pe);
void nvshmemx_signal_op(uint64_t* word, uint64_t value, int operation, int pe);
void nvshmem_uint64_wait_until(uint64_t* word, int comparison, uint64_t value);
