#include "nvshmem/job.hpp"

#include <nvshmem_host.h>

#include <cstring>

#include "cuda/api.hpp"

#if !defined(NVSHMEM_EMULATED)
// Of the device code in this module: its headers declare it for device code alone.
extern nvshmemi_device_host_state_t nvshmemi_device_state_d;
#endif

namespace deep_a2a::network {
namespace {

// As the library's inline functions do it, which end the process where this fails.
int initialize(unsigned flags, nvshmemx_init_attr_t* attributes) {
  const Version version = compiled_version();
  int provided = 0;
  return nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, flags, attributes,
                              {version.major, version.minor, version.patch});
}

void check_ready(int status, const char* what) {
  if (status != 0) throw CommError(text(what, " failed with status ", status, ": NVSHMEM_DEBUG=INFO says why"));
  if (job_status() != JobStatus::kReady) throw CommError(text(what, " has left NVSHMEM without a GPU"));
}

}  // namespace

Version compiled_version() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

Version library_version() {
  Version version{};
  nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
  return version;
}

JobStatus job_status() {
  const int status = nvshmemx_init_status();
  if (status == NVSHMEM_STATUS_NOT_INITIALIZED) return JobStatus::kNone;
  return status == NVSHMEM_STATUS_IS_BOOTSTRAPPED ? JobStatus::kBootstrapped : JobStatus::kReady;
}

std::string make_unique_id() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int status = nvshmemx_get_uniqueid(&id);
  if (status != 0) throw CommError(text("nvshmemx_get_uniqueid failed with status ", status));
  return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

void join_job(const std::string& unique_id, int pe, int num_pes, int device) {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  check_argument(unique_id.size() == sizeof(id), "a unique id has ", sizeof(id), " bytes, got ", unique_id.size());
  check_argument(job_status() == JobStatus::kNone, "NVSHMEM has been initialized in this process already");
  std::memcpy(&id, unique_id.data(), sizeof(id));
  const cuda::OnDevice on(device);
  cuda::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // there is a context from here on
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  nvshmemx_set_attr_uniqueid_args(pe, num_pes, &id, &attributes);
  check_ready(initialize(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes), "joining the NVSHMEM job");
}

void share_job(int device) {
  check_argument(job_status() == JobStatus::kReady, "NVSHMEM has not been initialized in this process");
  const cuda::OnDevice on(device);
  check_ready(initialize(0, nullptr), "sharing the NVSHMEM job");
}

void leave_job() { nvshmem_finalize(); }

int my_pe() { return nvshmem_my_pe(); }
int num_pes() { return nvshmem_n_pes(); }

char* allocate_symmetric(int64_t bytes, int device) {
  const cuda::OnDevice on(device);
  return static_cast<char*>(nvshmem_malloc(static_cast<size_t>(bytes)));
}

char* mapped_at_pe(const char* symmetric, int pe) { return static_cast<char*>(nvshmem_ptr(symmetric, pe)); }

void quiet(cudaStream_t stream) { nvshmemx_quiet_on_stream(stream); }

TransportChoice transport_choice(int device) {
  const cuda::OnDevice on(device);
  nvshmemi_device_host_state_t state;
  cuda::check_cuda(cudaMemcpyFromSymbol(&state, &nvshmemi_device_state_d, sizeof(state), 0, cudaMemcpyDeviceToHost),
                   "reading NVSHMEM's state");
  int ordering = 0;
  cuda::check_cuda(cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device),
                   "cudaDeviceGetAttribute");
  const bool may_flush = state.job_connectivity == NVSHMEMI_JOB_GPU_PROXY_CST;
  return {state.ibgda_is_initialized, state.proxy == NVSHMEMI_PROXY_FULL,
          may_flush && ordering < cudaGPUDirectRDMAWritesOrderingOwner};
}

}  // namespace deep_a2a::network
