// This process's part in an NVSHMEM job: joining one, sharing one that somebody else has joined, and what it is like.
// A process is in one job at most. Calls marked "collective" have to come from all PEs and wait for them without a
// deadline of their own: the caller keeps one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace deep_a2a::network {

struct Version {
  int major, minor, patch;
};
Version compiled_version();  // of the device code in this module
Version library_version();   // of the host library that this process has loaded

// As the library counts, whoever has initialised it. kBootstrapped: PEs have met, but none had a GPU selected.
enum class JobStatus : int { kNone = 0, kBootstrapped = 1, kReady = 2 };
JobStatus job_status();

// Names a new job; handed to all that are to join it.
std::string make_unique_id();
// Collective. The calling thread's device becomes the PE's. Throws CommError where the library reports a failure.
void join_job(const std::string& unique_id, int pe, int num_pes, int device);
// The job that is there already, for this module's kernels too. Not collective.
void share_job(int device);
// Gives back join_job() or share_job(). Collective for whoever is the last user of the library in its process.
void leave_job();

int my_pe();
int num_pes();

// Collective. Symmetric memory, never given back; null where there is none.
char* allocate_symmetric(int64_t bytes, int device);
// The same place at another PE, as it is mapped here, or null.
char* mapped_at_pe(const char* symmetric, int pe);
// The stream goes on once all puts of this process, kernels' among them, have been delivered.
void quiet(cudaStream_t stream);

// How bytes reach PEs whose memory is not mapped here.
struct TransportChoice {
  bool direct;       // kernels talk to the NIC (IBGDA)
  bool proxy;        // a host thread does
  bool needs_flush;  // GPUDirect writes may become visible out of order: see flush_arrivals()
};
TransportChoice transport_choice(int device);

}  // namespace deep_a2a::network
