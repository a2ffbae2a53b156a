// Combine on one node where rows are ready as they are: each token's are pulled from their ranks and added (C2).
#pragma once

#include "cuda/ring_sum.cuh"

namespace deep_a2a::cuda {

// The block's share of the tokens.
__device__ inline void c2_gather(const Context& c, const CombineTask& t) {
  SumRing ring(c, t.plan);
  if (!ring.in_use()) return;
  const int row_bytes = static_cast<int>(c.shape.max_payload_bytes()), locals = c.num_locals();
  const char* rows = nullptr;  // of this rank at the lane's
  if (lane_idx() < locals) {
    rows = c.region(lane_idx(), Region::kCombineRows, c.lane) + int64_t{t.source.rank_bases[lane_idx()]} * row_bytes;
  }
  const auto fetch_place = [&](int token) -> int32_t {
    if (token >= t.num_tokens || lane_idx() >= locals) return -1;
    return t.source.rank_places[int64_t{token} * locals + lane_idx()];
  };
  const int step = t.plan.num_rings * static_cast<int>(gridDim.x);
  int token = ring.idx() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  int32_t next = fetch_place(token);
  for (; token < t.num_tokens; token += step) {
    const int32_t place = next;
    next = fetch_place(token + step);                                            // under way while this token is summed
    const char* row = place >= 0 ? rows + int64_t{place} * row_bytes : nullptr;  // ranks ascend
    ring.sum(sum_of(row, static_cast<char*>(t.args.out) + int64_t{token} * row_bytes), row_bytes);
  }
}

}  // namespace deep_a2a::cuda
