// What a rank does that gives up, or learns that another has. See "Faults" in docs/protocol.md.
#pragma once

#include "cuda/context.cuh"
#include "cuda/network.cuh"
#include "protocol/steps.hpp"

namespace deep_a2a::cuda {

// What is hardly ever run, or waits anyway, is a call that takes parameters of the kernel and values: so it does not
// lie between code that is run, and nothing has to be in memory for its sake.
#define DEEP_A2A_COLD static __device__ __attribute__((noinline))

__device__ inline uint64_t abort_word(const Team& team) {
  const auto* word =
      reinterpret_cast<const uint64_t*>(team.windows[team.sizes.local_rank] + team.layout.offset(Region::kAbort));
  return ptx::ld_relaxed_sys(word) != 0 ? ptx::ld_acquire_sys(word) : 0;
}

// One thread of the rank's kernels hands the host a record, its own or that of whoever gave up.
__device__ inline bool claims_report(const Team& team) {
  return ptx::atom_exch_acq_rel_gpu(&team.control->fault_reported, 1) == 0;
}

__device__ inline FaultRecord* fault_record(const Team& team, int local, uint64_t aborted_by) {
  return reinterpret_cast<FaultRecord*>(team.windows[local] + team.layout.offset(Region::kFaults)) + (aborted_by - 1);
}

__device__ inline void tell_host(const Team& team, const FaultRecord& record, uint64_t aborted_by) {
  const auto* from = reinterpret_cast<const uint64_t*>(&record);
  auto* mailbox = reinterpret_cast<uint64_t*>(&team.mailbox->fault);
  for (unsigned i = 0; i < sizeof(FaultRecord) / 8; ++i) mailbox[i] = from[i];
  ptx::st_release_sys(&team.mailbox->fault_set, aborted_by);
}

// Every rank of the node, and the rail peers, who tell theirs: one thread for each node of theirs is enough.
__device__ inline void tell_peers(const Team& team, const FaultRecord& record, uint64_t aborted_by) {
  for (int local = 0; local < team.shape.topology.ranks_per_node; ++local) {
    *fault_record(team, local, aborted_by) = record;
    ptx::st_release_sys(reinterpret_cast<uint64_t*>(team.windows[local] + team.layout.offset(Region::kAbort)),
                        aborted_by);
  }
  if constexpr (kHasNetwork) {
    FaultRecord* own = fault_record(team, team.sizes.local_rank, aborted_by);
    char* window = team.windows[team.sizes.local_rank];
    auto* word = reinterpret_cast<uint64_t*>(window + team.layout.offset(Region::kAbort));
    for (int node = 0; node < team.sizes.num_nodes; ++node) {
      if (node == team.sizes.node) continue;
      put_signal_thread(own, own, sizeof(*own), word, aborted_by, team.control->rails[node].pe);
    }
  }
}

// Somebody else has given up.
DEEP_A2A_COLD void report_fault(const Team& team, uint64_t aborted_by) {
  if (!claims_report(team)) return;
  FaultRecord record;
  const auto* from = reinterpret_cast<const uint64_t*>(fault_record(team, team.sizes.local_rank, aborted_by));
  auto* to = reinterpret_cast<uint64_t*>(&record);
  for (unsigned i = 0; i < sizeof(FaultRecord) / 8; ++i) to[i] = ptx::ld_relaxed_sys(from + i);
  tell_host(team, record, aborted_by);
  if (team.sizes.num_nodes > 1) tell_peers(team, record, aborted_by);
}

// The first thread of this rank to give up tells all others; those find that it has.
DEEP_A2A_COLD void give_up(const Team& team, FaultRecord record) {
  if (!claims_report(team)) return;
  const uint64_t self = static_cast<uint64_t>(team.rank) + 1;
  tell_host(team, record, self);
  tell_peers(team, record, self);
}

}  // namespace deep_a2a::cuda
