// Sums whose terms lie near: each warp loads and adds for itself, through registers.
#pragma once

#include "cuda/terms.cuh"

namespace deep_a2a::cuda {

// Pieces of 16 bytes that a lane has under way: enough of the block's loads to cover the latency of memory.
constexpr int kPiecesUnderWay = 14;

// kPieces pieces of a lane, one warp's width apart, of kCount rows. All loads are issued before one is waited for.
template <int kCount, int kPieces>
__device__ inline void sum_pieces(const char* const (&rows)[kCount], const float (&weights)[kCount], int offset,
                                  char* out) {
  uint4 packed[kCount][kPieces];
#pragma unroll
  for (int term = 0; term < kCount; ++term) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) packed[term][i] = ptx::ld_once(rows[term] + offset + i * kSumStride);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float sum[8];
#pragma unroll
    for (int term = 0; term < kCount; ++term) add_term(sum, packed[term][i], weights[term], term == 0);
    *reinterpret_cast<uint4*>(out + offset + i * kSumStride) = rounded(sum);
  }
}

template <int kCount>
__device__ inline void add_terms(const Sum& sum, int bytes) {
  constexpr int kPieces = kPiecesUnderWay / kCount > 0 ? kPiecesUnderWay / kCount : 1;
  const char* rows[kCount];
  float weights[kCount];
#pragma unroll
  for (int term = 0; term < kCount; ++term) {
    rows[term] = shuffled(sum.row, term);
    weights[term] = shuffled(sum.weight, term);
  }
  int first = 0;
#pragma unroll 1
  for (; first + kPieces * kSumStride <= bytes; first += kPieces * kSumStride) {
    sum_pieces<kCount, kPieces>(rows, weights, first + lane_idx() * 16, sum.out);
  }
#pragma unroll 1
  for (first += lane_idx() * 16; first < bytes; first += kSumStride) {
    sum_pieces<kCount, 1>(rows, weights, first, sum.out);
  }
}

// Any number of terms, none included, some of which may be apart.
__device__ inline void add_many_terms(const Sum& sum, int bytes) {
#pragma unroll 1
  for (int first = 0; first < bytes; first += kSumStride) {
    const int offset = first + lane_idx() * 16;
    float all[8] = {}, apart[8] = {};
#pragma unroll 4
    for (int term = 0; term < sum.count; ++term) {
      const char* row = shuffled(sum.row, term);
      const float weight = shuffled(sum.weight, term);
      const uint4 packed = offset < bytes ? ptx::ld_once(row + offset) : uint4{};
      if (!sum.is_apart() || term < sum.apart_begin || term >= sum.apart_end) {
        add_term(all, packed, weight, term == 0);
        continue;
      }
      add_term(apart, packed, weight, term == sum.apart_begin);
      if (term < sum.apart_end - 1) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) all[i] = __fadd_rn(all[i], apart[i]);
    }
    if (offset < bytes) *reinterpret_cast<uint4*>(sum.out + offset) = rounded(all);
  }
}

// Writes the sum, rounded, anywhere on the node.
__device__ inline void add_terms(const Sum& sum, int bytes) {
  switch (sum.is_apart() ? 0 : sum.count) {
    case 1:
      return add_terms<1>(sum, bytes);
    case 2:
      return add_terms<2>(sum, bytes);
    case 3:
      return add_terms<3>(sum, bytes);
    case 4:
      return add_terms<4>(sum, bytes);
    case 5:
      return add_terms<5>(sum, bytes);
    case 6:
      return add_terms<6>(sum, bytes);
    case 7:
      return add_terms<7>(sum, bytes);
    case 8:
      return add_terms<8>(sum, bytes);
    default:
      return add_many_terms(sum, bytes);
  }
}

// All sums of `source`, by one warp. Its fetch(Fetched&), false at the end, begins to read what there is to know of the
// next sum; prepare(Fetched&, Sum&) waits for the terms, false where the kernel has to be left; finish(Fetched&) comes
// when the sum has been written.
template <class Source>
__device__ inline bool add_all(Source& source, int row_bytes) {
  typename Source::Fetched now, next;
  bool more = source.fetch(next);
  while (more) {
    now = next;
    more = source.fetch(next);  // under way while this one is summed
    Sum sum;
    if (!source.prepare(now, sum)) return false;
    if (sum.out != nullptr) add_terms(sum, row_bytes);
    source.finish(now);
  }
  return true;
}

}  // namespace deep_a2a::cuda
