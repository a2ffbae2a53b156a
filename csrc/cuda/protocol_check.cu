// Compiled and never run: proves that a kernel can take the protocol's structs by value and call its functions.
#include <type_traits>

#include "common/check.hpp"
#include "protocol/args.hpp"
#include "protocol/layout.hpp"
#include "protocol/numerics.hpp"
#include "protocol/shape.hpp"
#include "protocol/steps.hpp"
#include "protocol/topology.hpp"
#include "protocol/wire.hpp"

namespace deep_a2a {
namespace {

static_assert(std::is_trivially_copyable_v<Shape> && std::is_trivially_copyable_v<WindowLayout>);
static_assert(std::is_trivially_copyable_v<DispatchArgs> && std::is_trivially_copyable_v<CombineArgs>);

__device__ int64_t sum_topology(const Topology& topology, int rank) {
  const int node = topology.node_of(rank);
  const int64_t places = topology.rank_of(node, topology.local_of(rank)) + topology.rail_peer(rank, 0);
  const int64_t streams = topology.stream_idx(node, 0) + topology.stream_node(node, 0);
  return places + streams + topology.num_nodes() + topology.num_peer_nodes();
}

__device__ int64_t sum_shape(const Shape& shape, int expert) {
  const int64_t experts = shape.num_local_experts() + shape.experts_per_node();
  const int64_t places = shape.rank_of_expert(expert) + shape.node_of_expert(expert);
  const int64_t rows = shape.all_tokens() + shape.slot_rows() + shape.worst_case_rows() + shape.slot_rank_rows();
  return experts + places + rows + shape.max_payload_bytes() + shape.num_scale_groups() + shape.max_scale_bytes();
}

__device__ int64_t sum_wire(const Shape& shape, const RowFormat& format) {
  const int64_t rows = StreamRow::dispatch(shape, format, false).bytes + StreamRow::combine(shape, true).side_offset;
  return rows + StreamRow::max_bytes(shape) + format.scale_pitch() + rows_per_chunk(shape) + max_chunks(shape);
}

template <class Format>
__device__ uint8_t recast(uint16_t value, float scale) {
  return float_to_fp8<Format>(bf16_to_float(float_to_bf16(bf16_to_float(value) * scale)));
}

}  // namespace

__global__ void protocol_check(Shape shape, WindowLayout layout, DispatchArgs dispatch, CombineArgs combine,
                               char* window, int rank) {
  const auto* x = static_cast<const uint16_t*>(dispatch.x);
  auto* rows = reinterpret_cast<uint8_t*>(window + layout.offset(Region::kRecvRows, dispatch.slot));
  rows[threadIdx.x] =
      dispatch.cast == Cast::kE5M2 ? recast<E5M2>(x[threadIdx.x], 1.0f) : recast<E4M3>(x[threadIdx.x], 1.0f);

  const auto counts = CountVector::at(shape, window + layout.offset(Region::kCounts));
  counts.header->num_tokens = dispatch.num_tokens;
  counts.expert_rows[threadIdx.x] = reinterpret_cast<const RouteEntry*>(combine.rows)[threadIdx.x].expert_row;

  auto& fault = *reinterpret_cast<FaultRecord*>(window + layout.offset(Region::kFaults));
  fault.step = Step::kD2Exchange;
  fault.rank = rank;
  fault.expected = sum_topology(shape.topology, rank) + sum_shape(shape, 0);
  fault.seen = sum_wire(shape, dispatch.format) + CountVector::bytes(shape);
}

}  // namespace deep_a2a
