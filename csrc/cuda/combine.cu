// The kernel of combine: who does which step, and what is waited for in between. docs/protocol.md has the steps.
#include "cuda/course.cuh"
#include "cuda/kernels.cuh"
#include "cuda/sums.cuh"

namespace deep_a2a::cuda {
namespace {

// C1: the side payload of the rank rows, where sources can read it.
__device__ void c1_side(const Context& c, const CombineTask& t) {
  const int64_t entries = int64_t{ReceivedCounts::at(c.shape, t.kept.counts).num_received[1]} * c.shape.num_topk;
  const ReceivedRouting routing = ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing);
  auto* out = reinterpret_cast<float*>(c.own(Region::kCombineSide, c.lane));
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t entry = first; entry < entries; entry += step) {
    if (c.shape.row_per_expert()) {
      const int32_t row = routing.expert_rows[entry];
      out[entry] = row >= 0 ? t.args.side[row] : 0.0f;
    } else {
      out[entry] = t.args.side[entry];
    }
  }
}

// C2: each slot's value from the rank that has its expert; +0 without one.
__device__ void c2_gather_side(const Context& c, const CombineTask& t) {
  const int64_t entries = int64_t{t.num_tokens} * c.shape.num_topk;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t entry = first; entry < entries; entry += step) {
    const int expert = t.source.experts[entry];
    float value = 0.0f;
    if (expert >= 0) {
      const int local = c.local_of_expert(expert);
      const int64_t place = t.source.rank_places[entry / c.shape.num_topk * c.num_locals() + local];
      const auto* side = reinterpret_cast<const float*>(c.region(local, Region::kCombineSide, c.lane));
      value = ptx::ld_relaxed_sys(side + (place + t.source.rank_bases[local]) * c.shape.num_topk +
                                  entry % c.shape.num_topk);
    }
    t.args.side_out[entry] = value;
  }
}

// C0, C1: rows that the caller has written are readable, and the side payload is. Own sums become so later, in chunks.
__device__ bool make_ready(const Context& c, const CombineTask& t) {
  if (!all_of_block(wait_lane_credit(c, Step::kC0Credit))) return false;
  if (t.args.with_side) c1_side(c, t);
  if (last_block(c, c.control.grid.readied)) {
    signal_node(c, Region::kReadyFlag, c.local_rank(), Tag::word(c.epoch, c.tag));
  }
  return true;
}

__device__ int64_t row_wire_bytes(const Context& c, const CombineTask& t) {
  return c.shape.max_payload_bytes() + (t.args.with_side ? c.shape.num_topk * 4 : 0);
}

}  // namespace

__global__ void __launch_bounds__(kBlockThreads, 1)
    combine_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineTask t) {
  const Context c(team, t.lane, t.half, Tag::combine(t.args.with_side));
  begin(c, t.half);
  if (t.half != Half::kReceive && !make_ready(c, t)) return;
  if (t.half != Half::kSend && !wait_node_tagged(c, Region::kReadyFlag, Step::kC2Gather)) return;
  ptx::fence_proxy_async_global();  // rows of peers, acquired by ordinary loads, are read by bulk loads
  if (!all_of_block(Sums(c, t).run())) return;
  if (t.half != Half::kSend && t.args.with_side) c2_gather_side(c, t);
  if (!last_block(c, c.control.grid.left)) return;
  if (t.half != Half::kSend) {
    if (!return_rows(c, Step::kC5CreditReturned)) return;
    if (threadIdx.x == 0) count_wire_bytes(c, t.source, row_wire_bytes(c, t));
    give_lane_credit(c);
  }
  end(c);
}

}  // namespace deep_a2a::cuda
