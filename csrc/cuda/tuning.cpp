#include "cuda/tuning.hpp"

#include <algorithm>

#include "common/check.hpp"
#include "cuda/shared_sizes.hpp"

namespace deep_a2a::cuda {
namespace {

constexpr int kStageAlignment = 128;
constexpr int kPushChunkBytes = 7168;            // a row of 7168 FP8 channels; longer rows go in pieces
constexpr int kMostMoveWarps = 10;               // measured: more take shared memory from the stages
constexpr int kMostCastWarps = kBlockWarps - 2;  // the others have the routing
constexpr int kPushTenths = 6;                   // of the warps with rings
constexpr int kCastChunkBytes = 8192;            // of BF16: a cast wants more warps than a copy
constexpr int kCastStagesWanted = 2;
constexpr int kStagesWanted = 3;  // one loads, one is full, one is being stored
constexpr int kMostSumRings = kBlockWarps / 2;
constexpr int kFewestSumStages = 8;
constexpr int kRowsOfPart = 4;  // of a warp
// A cast makes its scales in whole 16 bytes for every chunk: 16 groups of UE8M0, one byte each.
constexpr int kCastChunkChannels = 16 * kScaleGroupChannels;
constexpr int kFewTokens = 512;  // for a block to count all by itself: 32 for each of its warps
constexpr int kDefaultSms = 12;

int aligned(int64_t bytes, int alignment = kStageAlignment) {
  return static_cast<int>(align_up<int64_t>(bytes, alignment));
}

// Bytes of a row's input that one stage takes.
int64_t chunk_of(const Shape& shape, const DispatchArgs& args, bool casts, int64_t most_bytes) {
  const int64_t input = casts ? shape.max_payload_bytes() : args.format.payload_bytes;
  if (casts) {
    if (input <= std::min<int64_t>(most_bytes, kCastChunkBytes)) return input;
    most_bytes = std::min<int64_t>(most_bytes, kCastChunkBytes);
    const int64_t unit = int64_t{2} * kCastChunkChannels;
    return std::max(unit, most_bytes / unit * unit);
  }
  const int64_t pieces = ceil_div<int64_t>(input, kPushChunkBytes);
  return align_up<int64_t>(ceil_div(input, pieces), kRowAlignment);
}

}  // namespace

DispatchPlan plan_dispatch(const Shape& s, const DispatchArgs& args, const DeviceLimits& limits) {
  DispatchPlan plan;
  const int before_arena = arena_begin(s.topology.num_nodes());
  const int64_t arena = limits.shared_bytes - before_arena;
  const int64_t streams = s.topology.num_peer_nodes();
  plan.ring_offset = aligned((int64_t{s.topology.num_ranks} + 1 +
                              (s.row_per_expert() ? s.num_experts + 2 * s.num_local_experts() : 0) +
                              streams * (s.topology.ranks_per_node + s.experts_per_node())) *
                             4);
  const int64_t left = arena - plan.ring_offset;

  const int64_t counters = (int64_t{s.num_experts} + s.topology.num_ranks + streams) * 4;  // of a warp
  // Eight lanes, each at the same word of a token of its own, find eight banks.
  const int64_t image = s.row_per_expert() ? RouteRecord::bytes(s) : align_up<int64_t>(s.num_topk * 4, kRowAlignment);
  plan.image_bytes = static_cast<int>(image / kRowAlignment % 2 == 0 ? image + kRowAlignment : image);
  const int64_t counting = counters + int64_t{kWarpThreads} * plan.image_bytes;  // with its batch of records
  const int64_t counted = counters + CountVector::bytes(s) + kRowAlignment;      // of all warps
  const int64_t bases = (int64_t{s.num_experts} + 2 * s.topology.num_ranks + s.topology.ranks_per_node) * 4;
  const int64_t least = std::max(counted + counting, bases);
  check_argument(least <= left, "num_experts = ", s.num_experts,
                 " is too many for the counters in a block's shared memory: they take ", least, " of ", left, " bytes");
  plan.counting = args.num_tokens <= kFewTokens ? Counting::kAlone : Counting::kShared;
  plan.count_warps = static_cast<int>(std::min<int64_t>(kBlockWarps, (left - counted) / counting));

  // A cast happens in the stage where rows are pushed; where they are pulled, it is over by then.
  const bool casts = args.cast != Cast::kNone && !s.row_per_expert();
  const int64_t input_bytes = casts ? s.max_payload_bytes() : args.format.payload_bytes;
  plan.num_targets = s.row_per_expert() ? s.num_topk : s.topology.ranks_per_node;
  const int64_t rows_bytes =
      std::max<int64_t>(align_up(plan.num_targets * 4, kRowAlignment), streams > 0 ? kMaxItemBytes : 0);
  const int64_t routes_bytes = streams > 0 ? s.num_topk * static_cast<int64_t>(sizeof(RouteEntry)) : 0;
  const int64_t side = args.format.scale_span() + routes_bytes + rows_bytes;
  const int64_t chunk = chunk_of(s, args, casts, left / 4 - side - kStageAlignment);
  plan.chunk_bytes = static_cast<int>(chunk);
  plan.num_chunks = static_cast<int>(ceil_div(input_bytes, chunk));
  plan.side_offset = aligned(chunk);
  plan.routes_offset = plan.side_offset + args.format.scale_span();
  plan.rows_offset = plan.routes_offset + static_cast<int>(routes_bytes);
  plan.stage_bytes = aligned(plan.rows_offset + rows_bytes);
  const int64_t stages = left / plan.stage_bytes;
  check_argument(stages >= 2, "rows of hidden = ", s.hidden, " with ", args.format.scale_bytes,
                 " bytes of scales do not fit a block's shared memory: two stages take ", 2 * plan.stage_bytes, " of ",
                 left, " bytes");
  plan.num_stages = static_cast<int>(std::min<int64_t>(stages, casts ? kCastStagesWanted : kStagesWanted));
  plan.move_warps =
      static_cast<int>(std::min<int64_t>(casts ? kMostCastWarps : kMostMoveWarps, stages / plan.num_stages));
  plan.num_stages = static_cast<int>(std::min<int64_t>(stages / plan.move_warps, kMaxBarriers / kBlockWarps));
  plan.push_warps = streams > 0 ? ceil_div(plan.move_warps * kPushTenths, 10) : plan.move_warps;

  const int64_t rings = int64_t{plan.move_warps} * plan.num_stages * plan.stage_bytes;
  const int64_t most = std::max({rings, counted + counting * plan.count_warps, bases});
  plan.shared_bytes = static_cast<int>(before_arena + plan.ring_offset + most);
  return plan;
}

CombinePlan plan_combine(const Shape& s, int num_sms, const DeviceLimits& limits) {
  CombinePlan plan;
  plan.shared_bytes = arena_begin(s.topology.num_nodes());
  if (s.topology.num_nodes() > 1) return plan;
  if (s.row_per_expert()) {  // a part should give every warp some rows, whose lengths even out
    const int enough = std::max(kRowsOfPart * ceil_div(kBlockWarps * num_sms, s.topology.ranks_per_node),
                                ceil_div(s.max_tokens, kMaxReadyParts));
    while (1 << plan.part_shift < enough) ++plan.part_shift;
    return plan;
  }
  plan.num_stages = std::max(s.topology.ranks_per_node, kFewestSumStages);
  const int64_t rings = (limits.shared_bytes - plan.shared_bytes) / (int64_t{plan.num_stages} * kSumChunkBytes);
  plan.num_rings = static_cast<int>(std::min<int64_t>({rings, kMostSumRings, kMaxBarriers / 2 / plan.num_stages}));
  check_argument(plan.num_rings > 0, "ranks_per_node = ", s.topology.ranks_per_node,
                 " does not fit a block's shared memory of ", limits.shared_bytes, " bytes");
  plan.chunk_bytes = static_cast<int>(std::min<int64_t>(kSumChunkBytes, s.max_payload_bytes()));
  plan.shared_bytes += plan.num_rings * plan.num_stages * kSumChunkBytes;
  return plan;
}

int check_num_sms(int num_sms, const DeviceLimits& limits) {
  check_argument(num_sms >= 0 && num_sms <= limits.num_sms, "num_sms must be between 1 and the device's ",
                 limits.num_sms, " SMs, got ", num_sms);
  return num_sms > 0 ? num_sms : std::min(kDefaultSms, limits.num_sms);
}

}  // namespace deep_a2a::cuda
