// How a launch divides shared memory and warps. Plain host C++, tested without a GPU; docs/tuning.md has the reasons.
#pragma once

#include <cstdint>

#include "protocol/args.hpp"
#include "protocol/shape.hpp"

namespace deep_a2a::cuda {

constexpr int kBlockThreads = 512;
constexpr int kBlockWarps = kBlockThreads / 32;

// What a device offers to one block, and how many blocks can be resident.
struct DeviceLimits {
  int num_sms = 0;
  int shared_bytes = 0;
};

// Who counts the tokens: each block its share, or, where they are few, each block all of them, with no need to meet.
enum class Counting : int { kShared = 0, kAlone = 1 };

// Of dispatch. Offsets are in the arena, in bytes.
struct DispatchPlan {
  Counting counting = Counting::kShared;
  int count_warps = 0;  // that count tokens
  int image_bytes = 0;  // from one token to the next where they have the experts, or the whole records, of 32 tokens
  int ring_offset = 0;  // behind what D3 leaves in the arena; the rings, before them the counters of D1 and D3
  int move_warps = 0;   // that move rows, each with a ring
  int push_warps = 0;   // of these, that begin with rows of the own node; with several nodes the others begin to relay
  int num_stages = 0;   // of a ring
  int stage_bytes = 0;
  int side_offset = 0;  // in a stage, behind the payload: scales, then route entries of other nodes, then where the row
                        // goes
  int routes_offset = 0;
  int rows_offset = 0;
  int num_targets = 0;   // lanes of a warp that store: one for each rank that a row can go to, or for each top-k slot
  int chunk_bytes = 0;   // of a row's input, that one stage takes
  int num_chunks = 0;    // of a row
  int shared_bytes = 0;  // dynamic shared memory of the block
};

struct CombinePlan {
  int num_rings = 0;    // of a warp that loads and a warp that adds; none where all terms lie near
  int num_stages = 0;   // of a ring: at least as many as a sum has terms
  int chunk_bytes = 0;  // of a row, in one stage, which has room for kSumChunkBytes
  int part_shift = 0;   // own rows become readable, and tokens follow them, in parts of 2^part_shift of each source
  int shared_bytes = 0;
};

constexpr int kMaxItemBytes = 32;     // of what a stage tells of its item, with several nodes
constexpr int kSumChunkBytes = 3584;  // 7 pieces of 16 bytes for each lane: the sums of as many fit its registers

// Both throw std::invalid_argument where a block cannot hold what the shape needs.
DispatchPlan plan_dispatch(const Shape& shape, const DispatchArgs& args, const DeviceLimits& limits);
CombinePlan plan_combine(const Shape& shape, int num_sms, const DeviceLimits& limits);

// `num_sms` if the device has as many; 0 asks for the default.
int check_num_sms(int num_sms, const DeviceLimits& limits);

}  // namespace deep_a2a::cuda
