#include "cpu/rank.hpp"

#include "common/check.hpp"
#include "common/errors.hpp"

namespace deep_a2a::cpu {

Rank::Rank(const Shape& shape, int rank, std::vector<std::shared_ptr<Window>> windows, double timeout_s,
           std::optional<uint64_t> network_seed)
    : transport_(shape, rank, std::move(windows), timeout_s, network_seed),
      slot_uses_(static_cast<size_t>(shape.num_slots), 0) {
  for (int idx = 0; idx < shape.num_lanes; ++idx) lanes_.push_back(std::make_unique<Lane>(idx));
}

void Rank::close() {
  for (const auto& lane : lanes_) lane->stop();
  transport_.close();
}

std::function<void(const Turn&)> Rank::guarded(std::function<void(const Turn&)> work) {
  return [this, work = std::move(work)](const Turn& turn) {
    try {
      work(turn);
    } catch (const CommError&) {  // known to the peers, or found by them as well
      throw;
    } catch (const std::invalid_argument&) {
      throw;
    } catch (...) {
      transport_.abandon(turn);
      throw;
    }
  };
}

std::shared_ptr<DispatchCall> Rank::dispatch(int lane_idx, const DispatchArgs& args, std::shared_ptr<Handle> cached) {
  check(args, cached.get());
  auto call = std::make_shared<DispatchCall>();
  call->lane = lane_idx;
  call->counts = std::make_shared<Event>();
  call->result = std::make_shared<Received>();
  call->handle = cached != nullptr ? cached : std::make_shared<Handle>();
  call->dispatch = std::make_shared<Dispatch>(transport_, lane_idx, args, call->handle, cached != nullptr, call->result,
                                              ++slot_uses_[args.slot]);
  const auto send = guarded([this, dispatch = call->dispatch, counts = call->counts](const Turn& turn) {
    transport_.begin(turn);
    dispatch->send(turn, [&] { counts->set(); });
  });
  call->sent = lane(lane_idx).begin([send, counts = call->counts](const Turn& turn) {
    try {
      send(turn);
    } catch (...) {
      counts->set(std::current_exception());
      throw;
    }
  });
  if (const auto error = call->sent->error()) call->counts->set(error);  // where the lane has stopped, nothing will run
  return call;
}

void Rank::receive(DispatchCall& call, const OwnedOutput& owned, const ColumnScales& columns) {
  const auto work = [dispatch = call.dispatch, sent = call.sent, owned, columns](const Turn& turn) {
    sent->wait();  // has run: rethrows what it failed with
    dispatch->receive(turn, owned, columns);
  };
  call.received = lane(call.lane).resume(guarded(work));
}

void Rank::release(DispatchCall& call) {
  lane(call.lane).resume([dispatch = call.dispatch](const Turn& turn) { dispatch->release(turn); });
}

std::shared_ptr<CombineCall> Rank::combine(int lane_idx, const CombineArgs& args, std::shared_ptr<Handle> handle) {
  auto call = std::make_shared<CombineCall>();
  call->lane = lane_idx;
  call->combine = std::make_shared<Combine>(transport_, args, std::move(handle));
  call->sent = lane(lane_idx).begin(guarded([this, combine = call->combine](const Turn& turn) {
    transport_.begin(turn);
    combine->send(turn);
  }));
  return call;
}

void Rank::receive(CombineCall& call) {
  call.received = lane(call.lane).resume(guarded([combine = call.combine, sent = call.sent](const Turn& turn) {
    sent->wait();
    combine->receive(turn);
  }));
}

Lane& Rank::lane(int idx) {
  check_argument(idx >= 0 && idx < static_cast<int>(lanes_.size()), "lane must be in [0, ", lanes_.size(), "), got ",
                 idx);
  return *lanes_[idx];
}

void Rank::check(const DispatchArgs& args, const Handle* cached) const {
  const Shape& s = transport_.shape();
  check_argument(args.num_tokens >= 0 && args.num_tokens <= s.max_tokens, "x has ", args.num_tokens,
                 " tokens, expected at most num_max_tokens_per_rank = ", s.max_tokens);
  check_argument(args.slot >= 0 && args.slot < s.num_slots, "slot must be in [0, ", s.num_slots, "), got ", args.slot);
  check_argument(args.format.payload_bytes > 0 && args.format.payload_bytes % kRowAlignment == 0 &&
                     args.format.payload_bytes <= s.max_payload_bytes(),
                 "a row of x must have whole 16 bytes, at most ", s.max_payload_bytes(), ", got ",
                 args.format.payload_bytes);
  check_argument(args.format.code >= 0 && args.format.code < kCastCode,
                 "the code of a row format must be in [0, 64), got ", args.format.code);
  check_argument(args.format.scale_bytes >= 0 && args.format.scale_bytes <= s.max_scale_bytes(), "a row of scales has ",
                 args.format.scale_bytes, " bytes, expected at most ", s.max_scale_bytes());
  check_argument(cached == nullptr || cached->num_tokens == args.num_tokens, "x has ", args.num_tokens,
                 " tokens, but the handle is of a dispatch of ", cached == nullptr ? 0 : cached->num_tokens);
}

}  // namespace deep_a2a::cpu
