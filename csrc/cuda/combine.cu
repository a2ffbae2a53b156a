// The kernel of combine: who does which step, and what is waited for in between. docs/protocol.md has the steps.
#include "cuda/course.cuh"
#include "cuda/gather.cuh"
#include "cuda/kernels.cuh"
#include "cuda/node_sums.cuh"
#include "cuda/pushed_sums.cuh"
#include "cuda/side.cuh"

namespace deep_a2a::cuda {
namespace {

__device__ int row_bytes(const Context& c) { return static_cast<int>(c.shape.max_payload_bytes()); }

// C0, C1: once `own_rows` has summed what it has to, if `sums`, rows are readable, and the side payload is. What the
// caller has written is so already.
template <class OwnRows>
__device__ bool c0_c1_ready(const Context& c, const CombineTask& t, bool sums, OwnRows&& own_rows) {
  if (!all_of_block(wait_lane_credit(c, Step::kC0Credit))) return false;
  if (t.args.with_side) c1_side(c, t);
  if (sums) own_rows();
  if (sums || t.args.with_side ? last_block(c, c.control.grid.readied) : blockIdx.x == 0) {
    signal_node(c, Region::kReadyFlag);
  }
  return true;
}

// All steps before C5 with one node: rows that the caller has written are ready at once, own sums become so later, in
// parts. False where the kernel has to be left.
__device__ bool sum_on_node(const Context& c, const CombineTask& t) {
  if (t.half != Half::kReceive && !c0_c1_ready(c, t, false, [] {})) return false;
  init_barriers(c.shared.barriers, kMaxBarriers);
  if (t.half != Half::kSend && !wait_node_tagged(c, Region::kReadyFlag, Step::kC2Gather)) return false;
  if (c.per_expert) {  // C1b and C2 by turns
    PushedSums sums(c, t);
    if (!all_of_block(add_all(sums, row_bytes(c)))) return false;
  } else if (t.half != Half::kSend) {
    ptx::fence_proxy_async_global();  // rows of peers, acquired by ordinary loads, are read by bulk loads
    c2_gather(c, t);
  }
  if (t.half != Half::kSend && t.args.with_side) c2_gather_side(c, t);
  return true;
}

DEEP_A2A_CALL void c1b_own_rows() {
  const auto& frame = call_frame<CombineTask>();
  const Context c = context_of_call(frame);
  OwnRows rows(c, frame.task);
  add_all(rows, row_bytes(c));
}

DEEP_A2A_CALL bool c3_relay(int round) {
  const auto& frame = call_frame<CombineTask>();
  const Context c = context_of_call(frame);
  RelayedRows rows(c, frame.task, round);
  const bool ok = add_all(rows, row_bytes(c));
  rows.count_bytes();
  return ok;
}

DEEP_A2A_CALL bool c2_c4_sum(int round) {
  const auto& frame = call_frame<CombineTask>();
  const Context c = context_of_call(frame);
  Tokens tokens(c, frame.task, round);
  const bool ok = add_all(tokens, row_bytes(c));
  if (ok) tokens.c4_give_credit();
  return ok;
}

// The same with several: step after step, and then by rounds.
__device__ bool sum_over_nodes(const Context& c, const CombineTask& t) {
  const bool sends = t.half != Half::kReceive;
  if (sends && !c0_c1_ready(c, t, c.per_expert, [] { c1b_own_rows(); })) return false;
  if (!wait_node_tagged(c, Region::kReadyFlag, sends ? Step::kC3Relay : Step::kC2Gather)) return false;
  const int rounds = c.sizes.num_rounds;
  bool ok = true;
  for (int round = 0; ok && sends && round < min(rounds, kStagedRounds); ++round) ok = c3_relay(round);
  for (int round = 0; ok && t.half != Half::kSend && round < rounds; ++round) {
    ok = c2_c4_sum(round);
    if (ok && round + kStagedRounds < rounds) ok = c3_relay(round + kStagedRounds);
  }
  return all_of_block(ok);
}

// Whether a rank reads what lies in the windows of others. Own sums are pushed.
__device__ bool reads_peers(const Context& c, const CombineTask& t) {
  return num_streams(c) > 0 || !c.per_expert || t.args.with_side;
}

__device__ bool sum_rows(const Context& c, const CombineTask& t) {
  if constexpr (kHasNetwork) {
    if (num_streams(c) > 0) return sum_over_nodes(c, t);
  }
  return sum_on_node(c, t);
}

__device__ __forceinline__ void combine(const Team& team, const CombineTask& t, RowsPer rows_per) {
  const Context c(team, t.lane, t.half, Tag::combine(t.args.with_side, t.plan.part_shift), rows_per);
  begin(c, t);
  if (!sum_rows(c, t) || !last_block(c, c.control.grid.left)) return;
  if (t.half != Half::kSend) give_lane_credit(c);
  end(c);
  if (t.half == Half::kSend) return;
  if (threadIdx.x == blockDim.x - 1) count_wire_bytes(c, t.source, row_wire_bytes(c, t));
  if (reads_peers(c, t)) wait_rows_read(c, Step::kC5CreditReturned);
}

}  // namespace

__global__ void __launch_bounds__(kBlockThreads, 1)
    combine_rank_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t) {
  combine(team, t, RowsPer::kRank);
}

__global__ void __launch_bounds__(kBlockThreads, 1)
    combine_expert_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t) {
  combine(team, t, RowsPer::kExpert);
}

}  // namespace deep_a2a::cuda
