// Sums whose terms lie at other ranks: warps that load, each feeding one warp that adds, through a ring of the two.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/task.hpp"
#include "cuda/terms.cuh"

namespace deep_a2a::cuda {

// A pair of warps and its part of the block: `empty` barriers follow the `full` ones.
class SumRing {
 public:
  __device__ SumRing(const Context& c, const CombinePlan& plan)
      : plan_(plan),
        idx_(warp_idx() % plan.num_rings),
        memory_(c.arena + idx_ * plan.num_stages * kSumChunkBytes),
        full_(c.shared.barriers + idx_ * 2 * plan.num_stages) {}

  __device__ int idx() const { return idx_; }
  __device__ bool in_use() const { return warp_idx() < 2 * plan_.num_rings; }

  // One warp's part in one sum. Both warps of the ring go through the same sums.
  __device__ void sum(const Sum& sum, int row_bytes) {
    if (warp_idx() < plan_.num_rings) {
      load(sum, row_bytes);
    } else {
      add(sum, row_bytes);
    }
  }

 private:
  static constexpr int kPieces = kSumChunkBytes / kSumStride;
  static constexpr int kTogether = 2;  // terms

  __device__ uint64_t* empty(int stage) const { return full_ + plan_.num_stages + stage; }
  // `ahead` places from `from`, at most a whole round.
  __device__ RingPosition at(RingPosition from, int ahead) const {
    from.stage += ahead;
    if (from.stage >= plan_.num_stages) {
      from.stage -= plan_.num_stages;
      from.parity ^= 1;
    }
    return from;
  }

  // The terms' chunks, a lane for each term, once their stages are free.
  __device__ void load(const Sum& sum, int row_bytes) {
    RingPosition mine = at(at_, min(lane_idx(), sum.count));
    for (int offset = 0; offset < row_bytes; offset += plan_.chunk_bytes) {
      if (lane_idx() < sum.count) {
        const int bytes = min(plan_.chunk_bytes, row_bytes - offset);
        wait_full(empty(mine.stage), mine.parity ^ 1);  // a fresh barrier has passed the phase before its first
        ptx::fence_proxy_async_shared();                // what the other warp has read is overwritten by a bulk load
        ptx::mbarrier_arrive_expect_tx(full_ + mine.stage, bytes);
        ptx::bulk_load(memory_ + mine.stage * kSumChunkBytes, sum.row + offset, bytes, full_ + mine.stage);
      }
      // A parity tells one phase from the next alone. Whoever loaded what lay in a stage before has seen the stage
      // emptied for that: now all lanes know.
      __syncwarp();
      mine = at(mine, sum.count);
      at_ = at(at_, sum.count);
    }
  }

  // Adds the chunks, two terms at a time.
  __device__ void add(const Sum& sum, int row_bytes) {
    for (int offset = 0; offset < row_bytes; offset += plan_.chunk_bytes) {
      float values[kPieces][8] = {};
      if (sum.count > 0) add_stages<true>(values, sum.count);
      for (int term = kTogether; term < sum.count; term += kTogether) add_stages<false>(values, sum.count - term);
      const int bytes = min(plan_.chunk_bytes, row_bytes - offset);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int piece = i * kSumStride + lane_idx() * 16;
        if (piece < bytes) *reinterpret_cast<uint4*>(sum.out + offset + piece) = rounded(values[i]);
      }
    }
  }

  template <bool kFirst>
  __device__ void add_stages(float (&values)[kPieces][8], int count) {
    if (count == 1) {
      add_stages<kFirst, 1>(values);
    } else {
      add_stages<kFirst, kTogether>(values);
    }
  }

  // A whole stage: what lies behind the end of a shorter chunk is of no sum.
  template <bool kFirst, int kCount>
  __device__ void add_stages(float (&values)[kPieces][8]) {
    const char* stages[kCount];
    for (int term = 0; term < kCount; ++term) {
      const RingPosition there = at(at_, term);
      wait_full(full_ + there.stage, there.parity);
      stages[term] = memory_ + there.stage * kSumChunkBytes + lane_idx() * 16;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int term = 0; term < kCount; ++term) {
        const auto packed = *reinterpret_cast<const uint4*>(stages[term] + i * kSumStride);
        add_term(values[i], packed, 1.0f, kFirst && term == 0);
      }
    }
    __syncwarp();
    if (lane_idx() < kCount) ptx::mbarrier_arrive(empty(at(at_, lane_idx()).stage));
    at_ = at(at_, kCount);
  }

  const CombinePlan& plan_;
  const int idx_;
  char* const memory_;
  uint64_t* const full_;
  RingPosition at_;
};

}  // namespace deep_a2a::cuda
