// The kernel of dispatch: who does which step, and what is waited for in between. docs/protocol.md has the steps.
#include "cuda/bases.cuh"
#include "cuda/course.cuh"
#include "cuda/kernels.cuh"
#include "cuda/pull.cuh"
#include "cuda/push.cuh"
#include "cuda/rounds.cuh"
#include "cuda/settle.cuh"

namespace deep_a2a::cuda {
namespace {

// D0, slot: whether each receiver of the node has released its last use of it.
struct SlotCredit {
  const uint64_t* word;
  uint64_t uses;

  __device__ SlotCredit(const Context& c, const DispatchTask& t, int local)
      : word(c.word(c.local_rank(), Region::kSlotCredit, 0, int64_t{t.args.slot} * c.num_locals() + local)),
        uses(ptx::ld_relaxed_sys(&c.team.control->slots[t.args.slot].uses)) {}
};

// A first look, while others wait for something else. It has a meaning only after D3, when all agree on the slot.
__device__ void d0_look_at_slot(const Context& c, const DispatchTask& t) {
  const int local = static_cast<int>(threadIdx.x) - kWarpThreads;
  if (local < 0 || local >= c.num_locals()) return;
  const SlotCredit credit(c, t, local);
  if (ptx::ld_acquire_sys(credit.word) < credit.uses) c.shared.slot_taken = 1;
}

// Before the first store into the slot.
__device__ bool d0_slot_credit(const Context& c, const DispatchTask& t) {
  if (!c.shared.slot_taken) return true;
  const int local = static_cast<int>(threadIdx.x);
  bool ok = true;
  if (local < c.num_locals()) {
    const SlotCredit credit(c, t, local);
    ok = wait(c, credit.word, credit.uses, Step::kD0SlotCredit, c.neighbour(local));
  }
  ok = all_of_block(ok);
  ptx::fence_proxy_async_global();  // it was read by ordinary loads, now it is overwritten by bulk stores
  return ok;
}

// The last thread of a block waits for other blocks, while the others wait for credit and counts.
__device__ bool meets(const DispatchTask& t) {
  return t.plan.counting == Counting::kShared && threadIdx.x == blockDim.x - 1;
}

// Rows that are pulled lie in one region or another, depending on whether their source has cast them: whoever pulls
// them has to have been called alike.
__device__ uint32_t dispatch_tag(const DispatchTask& t, const Shape& shape) {
  const bool cast_by_source = t.args.cast != Cast::kNone && shape.row_per_expert();
  return Tag::dispatch(t.args.slot, t.args.format.code | (cast_by_source ? kCastCode : 0), t.cached);
}

DEEP_A2A_CALL void call_d4_send_nodes() {
  const auto& frame = call_frame<DispatchTask>();
  d4_send_nodes(context_of_call(frame), frame.task);
}

DEEP_A2A_CALL bool call_d4_send_nodes_turn(int round, int turn) {
  const auto& frame = call_frame<DispatchTask>();
  return d4_send_nodes_turn(context_of_call(frame), frame.task, round, turn);
}

DEEP_A2A_CALL bool call_d5_relay() {
  const auto& frame = call_frame<DispatchTask>();
  return d5_relay(context_of_call(frame), frame.task, call_d4_send_nodes_turn);
}

// D4 to other nodes, and D2 as a relay: neither needs a base. False where the kernel has to be left.
__device__ bool send_to_nodes(const Context& c, const DispatchTask& t) {
  if constexpr (kHasNetwork) {
    if (num_streams(c) == 0) return true;
    bool ok = true;
    if (!t.cached) {
      ok = t.plan.counting == Counting::kAlone || threadIdx.x != 0 || grid_wait(c, c.control.grid.placed);
      for (int node = threadIdx.x; node < c.sizes.num_nodes; node += blockDim.x) {
        wait_count(c, c.team.rank, node_rows_idx(node), ok);  // written by another block
      }
    }
    ptx::fence_proxy_async();  // the arena and credits, used by ordinary accesses, come before bulk copies
    if (!all_of_block(ok)) return false;
    ok = t.cached || d2_relay(c);
    call_d4_send_nodes();
    return all_of_block(ok);
  }
  return true;
}

// D1 and D2, D0 in between; where rows are per expert, D4 of their records. False where the kernel has to be left.
__device__ bool count_rows(const Context& c, const DispatchTask& t) {
  const CountArena arena(c, t.plan);
  d1_count_block(c, t, arena);
  d0_look_at_slot(c, t);
  bool ok = wait_lane_credit(c, Step::kD0Credit);
  ok = ok && (!meets(t) || grid_wait(c, c.control.grid.counted));
  if (!all_of_block(ok)) return false;
  d2_exchange(c, t, arena);
  d1_place(c, t, arena);
  return true;
}

// A cached dispatch has nothing to count.
__device__ bool reuse_counts(const Context& c, const DispatchTask& t) {
  d0_look_at_slot(c, t);
  if (!all_of_block(wait_lane_credit(c, Step::kD0Credit))) return false;
  ptx::fence_proxy_async();  // the slot, as acquired, was read by ordinary loads; now it is overwritten by bulk stores
  if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1) {
    const int32_t* rows = ReceivedCounts::at(c.shape, t.kept.counts).num_received;
    report_counts(c, t.ticket, rows[0], rows[1]);
  }
  return true;
}

// D4, where peers pull; told by the last warp but one, since the last one waits for other blocks.
__device__ void d4_offer_rows(const Context& c, const DispatchTask& t) {
  d4_prepare_input(c, t);
  __syncthreads();
  if (warp_idx() != num_warps() - 2) return;
  if (last_warp(c.shared.recorded, 1, c.control.grid.recorded)) warp_signals_node(c, Region::kRoutesFlag);
}

// D0 to D2, and what of D4 needs no base.
__device__ Course begin_sending(const Context& c, const DispatchTask& t) {
  if (!(t.cached ? reuse_counts(c, t) : count_rows(c, t))) return Course::kAborted;
  Stages(c, t.plan).begin();
  if (!send_to_nodes(c, t)) return Course::kAborted;
  if (c.per_expert) d4_offer_rows(c, t);
  return Course::kGoOn;
}

// D3, by each launch for itself: counts stay in the window until the lane's credit. shared.refused where all ranks
// refuse the dispatch. False where the kernel has to be left.
__device__ bool plan_rows(const Context& c, const DispatchTask& t) {
  const bool sends = t.half != Half::kReceive;
  const bool ok = !sends || !meets(t) || grid_wait(c, c.control.grid.placed);
  if (!d3_bases(c, t, BasesArena(c, t.plan), ok)) return false;
  ptx::fence_proxy_async();  // ordinary accesses of arena and slot, as acquired, come before bulk copies
  __syncthreads();
  if (sends && blockIdx.x == 0 && threadIdx.x == blockDim.x - 1) {  // of the warp that has the least to do
    report_counts(c, t.ticket, c.shared.refused ? kRefusedRows : c.shared.num_rows, c.shared.num_rank_rows);
  }
  return true;
}

// One launch, one node, rows by rank: there is nothing to do on arrival, as the routing has been kept while rows were
// on their way, and one block is enough to wait for the rows.
__device__ bool leaves_early(const Context& c, const DispatchTask& t) {
  return t.half == Half::kBoth && num_streams(c) == 0 && !c.per_expert;
}

// Layout kRank, by the warps that push no rows: D4 of the records, and D6 arrival of those that come, which may be
// before the rows. False where the kernel has to be left.
__device__ bool send_and_keep_routing(const Context& c, const DispatchTask& t) {
  const int first_warp = t.plan.move_warps;
  d4_send_records(c, t, first_warp);
  if (last_warp(c.shared.recorded, num_warps() - first_warp, c.control.grid.recorded)) {
    warp_signals_node(c, Region::kRoutesFlag);
  }
  if (!leaves_early(c, t)) return true;
  if (!warp_waits_tagged(c, Region::kRoutesFlag, Step::kD6Routes)) return false;
  d6_keep_routing(c, t, first_warp);
  return true;
}

// D4 to the own node, where rows are pushed.
__device__ Course push_rows(const Context& c, const DispatchTask& t) {
  bool ok = true;
  if (warp_idx() < t.plan.move_warps) {
    Pusher(c, t).d4_send_own_node();
  } else {
    ok = send_and_keep_routing(c, t);
  }
  if (num_streams(c) > 0) {  // warps that push nothing begin to relay
    if (warp_idx() < t.plan.push_warps && last_warp(c.shared.pushed, t.plan.push_warps, c.control.grid.sent)) {
      warp_signals_node(c, Region::kSentFlag);
    }
    return Course::kGoOn;
  }
  if (!all_of_block(ok)) return Course::kAborted;
  const bool last = last_block(c, c.control.grid.sent);
  if (last) signal_node(c, Region::kSentFlag);
  return last || !leaves_early(c, t) ? Course::kGoOn : Course::kDone;
}

__device__ Course send_rows(const Context& c, const DispatchTask& t) {
  if (c.shared.refused) return all_of_block(drain_streams(c)) ? Course::kRefused : Course::kAborted;
  if (!d0_slot_credit(c, t)) return Course::kAborted;
  return c.per_expert ? Course::kGoOn : push_rows(c, t);
}

// D5, and D6 for the rows that other relays have stored here. Before that `beside`, by the warps that have something to
// do there. False where the kernel has to be left.
template <class Beside>
__device__ bool receive_from_nodes(const Context& c, Beside&& beside) {
  beside();
  if (!all_of_block(call_d5_relay())) return false;
  if (last_block(c, c.control.grid.relayed)) {
    signal_node(c, Region::kRelayedFlag);
  }
  return wait_node_tagged(c, Region::kRelayedFlag, Step::kD6Relayed);
}

__device__ void d6_pull(const Context& c, const DispatchTask& t) {
  ptx::fence_proxy_async_global();  // rows of peers, acquired by ordinary loads, are read by bulk loads
  Puller(c, t).run();
}

// D5 and D6 arrival, with the rows that are pulled.
__device__ Course receive_half(const Context& c, const DispatchTask& t) {
  const bool pulls = c.per_expert;
  const bool relays = num_streams(c) > 0;
  if constexpr (kHasNetwork) {
    if (relays && !pulls && !receive_from_nodes(c, [] {})) return Course::kAborted;
  }
  if (!pulls && !wait_node_tagged(c, Region::kSentFlag, Step::kD6Sent)) return Course::kAborted;
  if (leaves_early(c, t)) return Course::kGoOn;
  if (!wait_node_tagged(c, Region::kRoutesFlag, Step::kD6Routes)) return Course::kAborted;
  if (pulls && !relays) d6_pull(c, t);
  if constexpr (kHasNetwork) {
    if (relays && pulls && !receive_from_nodes(c, [&] { d6_pull(c, t); })) return Course::kAborted;
  }
  d6_keep_routing(c, t, pulls && !relays ? t.plan.move_warps : 0);  // by the warps that pull nothing
  if (pulls && t.args.zero_padding) d6_zero_padding(c, t);
  return Course::kGoOn;
}

__device__ __forceinline__ void dispatch(const Team& team, const DispatchTask& t, RowsPer rows_per) {
  const Context c(team, t.lane, t.half, dispatch_tag(t, team.shape), rows_per);
  begin(c, t);
  Course course = Course::kGoOn;
  if (t.half != Half::kReceive) {
    course = begin_sending(c, t);
  } else if (!all_of_block(not_aborted(c))) {
    course = Course::kAborted;  // maybe by its send half: then the epoch is that of another operation
  } else if (ptx::ld_relaxed_sys(&c.control.refused_epoch) == c.epoch) {
    return;  // its send half has settled everything
  } else {
    Stages(c, t.plan).begin();
  }
  if (course == Course::kGoOn && !t.cached && !plan_rows(c, t)) course = Course::kAborted;
  if (course == Course::kGoOn && t.half != Half::kReceive) course = send_rows(c, t);
  if (course == Course::kDone) return;
  const bool is_last = course == Course::kGoOn && leaves_early(c, t);
  if (is_last) settle(c, t, course);
  if (course == Course::kGoOn && t.half != Half::kSend) course = receive_half(c, t);
  if (course != Course::kAborted && (is_last || last_block(c, c.control.grid.left))) {
    if (!is_last) settle(c, t, course);
    if (!finish(c, t, course)) course = Course::kAborted;
    if (course == Course::kRefused) clear_result(c, t);
  }
  if (course == Course::kAborted) clear_result(c, t);
}

}  // namespace

__global__ void __launch_bounds__(kBlockThreads, 1)
    dispatch_rank_kernel(const __grid_constant__ Team team, const __grid_constant__ DispatchTask t) {
  dispatch(team, t, RowsPer::kRank);
}

__global__ void __launch_bounds__(kBlockThreads, 1)
    dispatch_expert_kernel(const __grid_constant__ Team team, const __grid_constant__ DispatchTask t) {
  dispatch(team, t, RowsPer::kExpert);
}

__global__ void release_kernel(const __grid_constant__ Team team, int slot) { release_slot(team, slot); }

}  // namespace deep_a2a::cuda
