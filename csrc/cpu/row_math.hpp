// The arithmetic on rows: sums of combine, the FP8 cast of dispatch. Same bits on every machine; the fastest variant
// that the processor has is chosen at run time.
#pragma once

#include <cstdint>

#include "protocol/args.hpp"

namespace deep_a2a::cpu {

// The terms of one sum of BF16 rows, in their order. Those in [own_begin, own_end) are added among themselves first
// (the own node's ranks), the others are terms by themselves (nodes).
struct RowTerms {
  const uint16_t* const* rows;
  int count;
  int own_begin;
  int own_end;
};

// out = BF16 of the FP32 sum; +0 without terms.
void add_rows(const RowTerms& terms, uint16_t* out, int hidden);

// out = BF16 of weights[0] * rows[0], then fma; plain sum where `weights` is null. At least one row.
void weigh_rows(const uint16_t* const* rows, const float* weights, int count, uint16_t* out, int hidden);

// One BF16 row to FP8 with its scales: ceil(hidden / 128) FP32 values, or as many UE8M0 bytes.
void cast_row(const uint16_t* row, int hidden, Cast cast, ScaleFormat scale_format, uint8_t* payload, void* scales);

}  // namespace deep_a2a::cpu
