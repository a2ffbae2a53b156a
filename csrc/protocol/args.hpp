// The arguments of one operation, as plain data: what Python has checked and hands over.
#pragma once

#include <cstdint>

#include "protocol/wire.hpp"

namespace deep_a2a {

enum class Cast : int { kNone = 0, kE4M3 = 1, kE5M2 = 2 };
enum class ScaleFormat : int { kFloat32 = 0, kUE8M0 = 1 };

struct DispatchArgs {
  const void* x = nullptr;  // [num_tokens] rows, `x_pitch` bytes apart: payload, or BF16 to be cast
  int64_t x_pitch = 0;
  const void* scales =
      nullptr;  // [num_tokens] rows of format.scale_bytes, `scales_pitch` apart; null when cast or without
  int64_t scales_pitch = 0;
  const void* topk_idx = nullptr;       // [num_tokens, num_topk] int32 or int64; null when cached
  int topk_idx_bytes = 0;               // 4 or 8
  const float* topk_weights = nullptr;  // [num_tokens, num_topk], null for ones
  int num_tokens = 0;
  RowFormat format;
  Cast cast = Cast::kNone;
  ScaleFormat scale_format = ScaleFormat::kFloat32;
  int slot = 0;
  bool zero_padding = false;
  bool fixed_shapes = false;  // the routing of the result has room for every rank row of the slot
};

// Where an owned result goes; null for a leased one, which stays in its slot.
struct OwnedOutput {
  void* rows = nullptr;    // [rows of the result] of payload_bytes
  void* scales = nullptr;  // of scale_bytes; null without
};

struct CombineArgs {
  const void* rows = nullptr;   // BF16: [rank_rows, hidden] (kRank) or [rows, hidden]
  const float* side = nullptr;  // FP32: [rank_rows, num_topk] (kRank) or [rows]; null without
  bool weighted = false;
  bool with_side = false;     // on every rank or on none; a rank without rows has no pointer
  void* out = nullptr;        // BF16 [num_tokens, hidden]
  float* side_out = nullptr;  // FP32 [num_tokens, num_topk]; null without
};

}  // namespace deep_a2a
