#include "emulator/warp.hpp"

#include <algorithm>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"

namespace deep_a2a::emulator {
namespace {

// What a shuffle from a thread that takes no part gives; hardware leaves it undefined.
constexpr uint64_t kPoison = 0xBADC0DE5BADC0DE5u;

const char* name_of(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::kSync:
      return "__syncwarp";
    case WarpOperation::kShuffle:
      return "__shfl_sync";
    case WarpOperation::kShuffleUp:
      return "__shfl_up_sync";
    case WarpOperation::kShuffleDown:
      return "__shfl_down_sync";
    case WarpOperation::kShuffleXor:
      return "__shfl_xor_sync";
    case WarpOperation::kBallot:
      return "__ballot_sync";
    case WarpOperation::kAny:
      return "__any_sync";
    case WarpOperation::kAll:
      return "__all_sync";
    case WarpOperation::kMatchAny:
      return "__match_any_sync";
    case WarpOperation::kReduceAdd:
      return "__reduce_add_sync";
    case WarpOperation::kReduceOr:
      return "__reduce_or_sync";
    case WarpOperation::kReduceAnd:
      return "__reduce_and_sync";
    case WarpOperation::kReduceMaxSigned:
    case WarpOperation::kReduceMaxUnsigned:
      return "__reduce_max_sync";
    case WarpOperation::kReduceMinSigned:
    case WarpOperation::kReduceMinUnsigned:
      return "__reduce_min_sync";
  }
  return "a warp operation";
}

uint64_t reduce(WarpOperation operation, uint64_t a, uint64_t b) {
  const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
  const auto signed_x = static_cast<int32_t>(x), signed_y = static_cast<int32_t>(y);
  switch (operation) {
    case WarpOperation::kReduceAdd:
      return x + y;
    case WarpOperation::kReduceOr:
      return x | y;
    case WarpOperation::kReduceAnd:
      return x & y;
    case WarpOperation::kReduceMaxSigned:
      return static_cast<uint32_t>(std::max(signed_x, signed_y));
    case WarpOperation::kReduceMaxUnsigned:
      return std::max(x, y);
    case WarpOperation::kReduceMinSigned:
      return static_cast<uint32_t>(std::min(signed_x, signed_y));
    default:
      return std::min(x, y);
  }
}

uint32_t bit(int lane) { return 1u << lane; }

template <class Use>
void for_lanes(uint32_t lanes, Use&& use) {
  for (; lanes != 0; lanes &= lanes - 1) use(__builtin_ctz(lanes));
}

}  // namespace

void Warp::add(Thread* thread) {
  lanes_[thread->lane] = thread;
  present_ |= bit(thread->lane);
}

void Warp::check(const Thread& self, const WarpCall& call) const {
  if ((call.mask & bit(self.lane)) == 0) {
    throw KernelError(text(name_of(call.operation), ": mask 0x", std::hex, call.mask, std::dec,
                           " is without the caller's lane ", self.lane));
  }
  if (call.width < 1 || call.width > kWarpSize || (call.width & (call.width - 1)) != 0) {
    throw KernelError(text(name_of(call.operation), ": width is ", call.width, ", expected a power of 2 up to 32"));
  }
  if (alike(call, call.mask & waiting_)) return;
  for_lanes(call.mask & waiting_, [&](int lane) {
    const WarpCall& other = calls_[lane];
    if ((other.mask & bit(self.lane)) == 0) return;  // it may come here later
    if (other.mask == call.mask && other.operation == call.operation) return;
    throw KernelError(text(name_of(call.operation), " with mask 0x", std::hex, call.mask, " waits for lane ", std::dec,
                           lane, ", which is in ", name_of(other.operation), " with mask 0x", std::hex, other.mask));
  });
}

// Whether these lanes, which wait, have made this call.
bool Warp::alike(const WarpCall& call, uint32_t lanes) const {
  const bool is_last = call.mask == last_mask_ && call.operation == last_operation_;
  if (is_last && (lanes & ~last_group_) == 0) return true;  // nearly always
  bool all = true;
  for_lanes(lanes,
            [&](int lane) { all = all && calls_[lane].mask == call.mask && calls_[lane].operation == call.operation; });
  return all;
}

uint64_t Warp::call(Thread& self, const WarpCall& call) {
  Launch& launch = Launch::current();
  launch.note_progress();
  check(self, call);
  if (call.mask != last_mask_ || call.operation != last_operation_) last_group_ = 0;
  last_mask_ = call.mask;
  last_operation_ = call.operation;
  last_group_ |= bit(self.lane);
  calls_[self.lane] = call;
  waiting_ |= bit(self.lane);
  if (!complete(call)) launch.block(name_of(call.operation));
  return self.result;
}

// Whether all have come, who then get their results and go on.
bool Warp::complete(const WarpCall& call) {
  const uint32_t members = call.mask & present_;
  if ((waiting_ & members) != members || !alike(call, members)) return false;
  const WarpOperation operation = call.operation;
  if (operation >= WarpOperation::kReduceAdd) {
    uint64_t all = calls_[__builtin_ctz(members)].value;
    for_lanes(members & (members - 1), [&](int lane) { all = reduce(operation, all, calls_[lane].value); });
    for_lanes(members, [&](int lane) { lanes_[lane]->result = all; });
  } else if (operation >= WarpOperation::kBallot && operation <= WarpOperation::kAll) {
    uint64_t votes = 0;
    for_lanes(members, [&](int lane) { votes |= calls_[lane].value != 0 ? bit(lane) : 0; });
    if (operation == WarpOperation::kAny) votes = votes != 0;
    if (operation == WarpOperation::kAll) votes = votes == members;
    for_lanes(members, [&](int lane) { lanes_[lane]->result = votes; });
  } else if (operation != WarpOperation::kSync) {
    for_lanes(members, [&](int lane) { lanes_[lane]->result = result(lane, members); });
  }
  waiting_ &= ~members;
  Launch& launch = Launch::current();
  for_lanes(members, [&](int lane) { launch.release(lanes_[lane]); });
  return true;
}

uint64_t Warp::result(int lane, uint32_t members) const {
  if (calls_[lane].operation != WarpOperation::kMatchAny) return shuffled(lane, members);
  uint64_t same = 0;
  for_lanes(members, [&](int other) { same |= calls_[other].value == calls_[lane].value ? bit(other) : 0; });
  return same;
}

uint64_t Warp::shuffled(int lane, uint32_t members) const {
  const WarpCall& call = calls_[lane];
  const int segment = lane & ~(call.width - 1), end = segment + call.width;
  int from = lane;
  switch (call.operation) {
    case WarpOperation::kShuffle:
      from = segment + (call.operand & (call.width - 1));
      break;
    case WarpOperation::kShuffleUp:
      from = lane - call.operand < segment ? lane : lane - call.operand;
      break;
    case WarpOperation::kShuffleDown:
      from = lane + call.operand >= end ? lane : lane + call.operand;
      break;
    default:
      from = (lane ^ call.operand) >= end ? lane : lane ^ call.operand;
  }
  return (members & bit(from)) != 0 ? calls_[from].value : kPoison;
}

void Warp::exit(const Thread& thread) {
  present_ &= ~bit(thread.lane);
  for_lanes(waiting_, [&](int lane) {
    const bool waits = (waiting_ & bit(lane)) != 0 && (calls_[lane].mask & bit(thread.lane)) != 0;
    if (waits) complete(calls_[lane]);
  });
}

}  // namespace deep_a2a::emulator
