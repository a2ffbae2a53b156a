#include "nvshmem.h"

#include <cstring>

#include "emulator/control.hpp"
#include "emulator/launch.hpp"
#include "emulator/nvshmem_job.hpp"
#include "emulator/stream.hpp"

using deep_a2a::emulator::KernelError;
using deep_a2a::emulator::Launch;
using deep_a2a::emulator::NvshmemJob;

namespace {

NvshmemJob& job() { return NvshmemJob::instance(); }

void put(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value, int operation, int pe) {
  if (operation != NVSHMEM_SIGNAL_SET) throw KernelError("NVSHMEM: signals are set, never added to");
  Launch::current().preempt();
  job().put(static_cast<char*>(to), static_cast<const char*>(from), bytes, word, value, pe);
}

}  // namespace

int nvshmemx_init_status() {
  return job().is_joined() ? NVSHMEM_STATUS_IS_INITIALIZED : NVSHMEM_STATUS_NOT_INITIALIZED;
}

int nvshmemx_get_uniqueid(nvshmemx_uniqueid_t* id) {
  cudaIpcMemHandle_t name;
  static_assert(sizeof(name) <= sizeof(id->internal));
  if (!job().create(name)) return 1;
  memcpy(id->internal, &name, sizeof(name));
  return 0;
}

int nvshmemx_set_attr_uniqueid_args(int rank, int num_ranks, const nvshmemx_uniqueid_t* id,
                                    nvshmemx_init_attr_t* attr) {
  attr->args.uid_args = {0, const_cast<nvshmemx_uniqueid_t*>(id), rank, num_ranks};
  return 0;
}

int nvshmemi_init_thread(int, int* provided, unsigned flags, nvshmemx_init_attr_t* attr, nvshmemi_version_t) {
  *provided = NVSHMEM_THREAD_SERIALIZED;
  if (job().is_joined()) return 0;
  if (flags != NVSHMEMX_INIT_WITH_UNIQUEID || attr == nullptr) return 1;
  const nvshmemx_uniqueid_args_t& args = attr->args.uid_args;
  cudaIpcMemHandle_t name;
  memcpy(&name, args.id->internal, sizeof(name));
  return job().join(name, args.myrank, args.nranks) ? 0 : 1;
}

void nvshmem_finalize() { job().leave(); }

void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch) {
  *major = NVSHMEM_VENDOR_MAJOR_VERSION;
  *minor = NVSHMEM_VENDOR_MINOR_VERSION;
  *patch = NVSHMEM_VENDOR_PATCH_VERSION;
}

void* nvshmem_malloc(size_t bytes) { return job().allocate(bytes); }

void nvshmemx_quiet_on_stream(cudaStream_t stream) {
  deep_a2a::emulator::submit(stream, [] {
    job().drain();
    return cudaSuccess;
  });
}

int nvshmem_my_pe() { return job().pe(); }
int nvshmem_n_pes() { return job().num_pes(); }

void* nvshmem_ptr(const void* symmetric, int pe) { return job().is_on_node(pe) ? job().at(symmetric, pe) : nullptr; }

void nvshmem_putmem_signal_nbi(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value, int operation,
                               int pe) {
  put(to, from, bytes, word, value, operation, pe);
}

void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value,
                                     int operation, int pe) {
  __syncwarp();
  if (Launch::self().lane == 0) put(to, from, bytes, word, value, operation, pe);
  __syncwarp();
}

void nvshmemx_putmem_signal_nbi_block(void* to, const void* from, size_t bytes, uint64_t* word, uint64_t value,
                                      int operation, int pe) {
  __syncthreads();
  if (Launch::self().linear_idx == 0) put(to, from, bytes, word, value, operation, pe);
  __syncthreads();
}

void nvshmemx_signal_op(uint64_t* word, uint64_t value, int operation, int pe) {
  put(nullptr, nullptr, 0, word, value, operation, pe);
}

void nvshmem_uint64_wait_until(uint64_t* word, int comparison, uint64_t value) {
  if (comparison != NVSHMEM_CMP_GE) throw KernelError("NVSHMEM: waits are for a least value");
  do {
    deep_a2a::emulator::yield_outside();
  } while (__atomic_load_n(word, __ATOMIC_ACQUIRE) < value);
}
