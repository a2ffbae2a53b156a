#include "cpu/dispatch.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/copy.hpp"
#include "cpu/credit.hpp"
#include "cpu/row_math.hpp"
#include "cpu/streams.hpp"

namespace deep_a2a::cpu {
namespace {

// Hands the count vector of `source` to every rank of this node.
void store_counts(Transport& transport, const Turn& turn, int source, const char* vector) {
  const int64_t bytes = CountVector::bytes(transport.shape());
  for (int local = 0; local < transport.topology().ranks_per_node; ++local) {
    char* counts = transport.region(transport.neighbour(local), Region::kCounts, turn.lane);
    std::memcpy(counts + source * bytes, vector, static_cast<size_t>(bytes));
  }
  transport.signal_node(turn, Region::kCountsFlag, source, turn.epoch);
}

}  // namespace

Dispatch::Dispatch(Transport& transport, int lane, const DispatchArgs& args, std::shared_ptr<Handle> handle,
                   bool cached, std::shared_ptr<Received> result, uint64_t slot_use)
    : transport_(transport),
      shape_(transport.shape()),
      args_(args),
      handle_(std::move(handle)),
      cached_(cached),
      result_(std::move(result)),
      slot_use_(slot_use),
      tag_(Tag::dispatch(args.slot, args.format.code, cached)),
      stream_row_(StreamRow::dispatch(shape_, args.format, cached)),
      slot_(transport, lane, args.slot, args.format,
            int64_t{args.num_tokens} * args.format.payload_bytes > kStreamingInputBytes) {}

void Dispatch::send(const Turn& turn, const std::function<void()>& on_counts) {
  d0_credit(turn);
  d4_cast();
  if (!cached_) {
    d1_count();
    d2_exchange(turn);
  }
  for (int round = 0; round < std::min(kStagedRounds, shape_.num_rounds()); ++round) d4_send_nodes(turn, round);
  if (!cached_) {
    d2_relay(turn);
    d3_bases(turn);
  }
  *result_ = handle_->received;
  on_counts();
  d0_slot_credit(turn);
  d4_send_own_node(turn);
  // A handle keeps this object alive. Rounds that are still to be sent are read from the rows made by a cast.
  counts_ = {};
  if (!is_filled_again(shape_, 0)) cast_rows_ = {};
}

void Dispatch::receive(const Turn& turn, const OwnedOutput& owned, const ColumnScales& columns) {
  d5_relay(turn);
  bases_.reset();
  cast_rows_ = {};
  d6_arrival(turn);
  if (owned.rows != nullptr) slot_.copy_out(handle_->received, owned, args_.zero_padding);
  finish(turn);
  d7_column_scales(columns);
}

void Dispatch::release(const Turn& turn) {
  if (!settled_) release_slot(transport_, turn, args_.slot, slot_use_);
  settled_ = true;
}

void Dispatch::d0_credit(const Turn& turn) { wait_lane_credit(transport_, turn, Step::kD0Credit); }

// Not needed before the first store into the slot; by then all ranks have agreed on which slot that is.
void Dispatch::d0_slot_credit(const Turn& turn) { wait_slot_credit(transport_, turn, args_.slot, slot_use_ - 1); }

void Dispatch::d1_count() {
  counts_.resize(static_cast<size_t>(CountVector::bytes(shape_)));
  count_tokens(shape_, transport_.node(), args_, tag_, *handle_, CountVector::at(shape_, counts_.data()));
}

void Dispatch::d2_exchange(const Turn& turn) {
  const int streams = shape_.topology.num_peer_nodes();
  if (streams > 0) {
    char* out = transport_.region(transport_.rank(), Region::kNetCountsOut, turn.lane);
    std::memcpy(out, counts_.data(), counts_.size());
    for (int stream = 0; stream < streams; ++stream) {
      const int peer = transport_.rail_peer(stream), there = transport_.stream_at_peer(stream);
      char* to = transport_.region(peer, Region::kNetCountsIn, turn.lane) + there * CountVector::bytes(shape_);
      transport_.put_signal(peer, turn.lane, to, out, CountVector::bytes(shape_),
                            transport_.word(peer, Region::kNetCountsFlag, turn.lane, there), turn.epoch);
    }
  }
  store_counts(transport_, turn, transport_.rank(), counts_.data());
}

void Dispatch::d2_relay(const Turn& turn) {
  for (int stream = 0; stream < shape_.topology.num_peer_nodes(); ++stream) {
    const int peer = transport_.rail_peer(stream);
    transport_.wait(turn, transport_.word(transport_.rank(), Region::kNetCountsFlag, turn.lane, stream), turn.epoch,
                    {Step::kD2Exchange, peer});
    const char* in = transport_.region(transport_.rank(), Region::kNetCountsIn, turn.lane);
    store_counts(transport_, turn, peer, in + stream * CountVector::bytes(shape_));
  }
}

void Dispatch::d3_bases(const Turn& turn) {
  for (int source = 0; source < shape_.topology.num_ranks; ++source) {
    transport_.wait(turn, transport_.word(transport_.rank(), Region::kCountsFlag, turn.lane, source), turn.epoch,
                    {Step::kD3Bases, source});
  }
  const AllCounts counts(shape_, transport_.region(transport_.rank(), Region::kCounts, turn.lane));
  handle_->relay_routes.resize(static_cast<size_t>(shape_.topology.num_peer_nodes()));
  handle_->relay_round_starts.assign(static_cast<size_t>(shape_.topology.num_peer_nodes()),
                                     RoundStarts(static_cast<size_t>(shape_.num_rounds()) + 1, 0));
  for (int stream = 0; stream < shape_.topology.num_peer_nodes(); ++stream) {
    const int rows = counts.of(transport_.rail_peer(stream)).node_rows[transport_.node()];
    handle_->relay_routes[stream].resize(static_cast<size_t>(rows) * shape_.num_topk);
    handle_->relay_round_starts[stream].back() = rows;
  }
  const Verdict verdict = agree(shape_, counts);
  if (verdict.refusal) refuse(turn, verdict);
  bases_.emplace(shape_, transport_.node(), counts);
  for (RouteEntry& entry : handle_->routes) {
    if (bases_->on_node(entry.expert)) bases_->apply(transport_.rank(), entry);
  }
  handle_->received = count_received(shape_, transport_.rank(), counts, args_.fixed_shapes);
}

// Every rank comes here with the same verdict. What is on its way to this rank as a relay is waited for and dropped;
// the slot counts as used and released, in its turn.
void Dispatch::refuse(const Turn& turn, const Verdict& verdict) {
  for (int round = 0; round < std::min(kStagedRounds, shape_.num_rounds()); ++round) {
    std::vector<int> rows = relay_rows(round);
    drain_round(transport_, turn, Step::kD5Relay, std::nullopt, round, rows, [](int, int, int, int) {});
  }
  finish(turn);
  if (verdict.slots_disagree) {
    settled_ = true;
    transport_.poison(verdict.refusal);
  } else {
    d0_slot_credit(turn);
    release(turn);
  }
  std::rethrow_exception(verdict.refusal);
}

void Dispatch::d4_cast() {
  if (args_.cast == Cast::kNone) return;
  const int64_t payload = args_.format.payload_bytes, scales = args_.format.scale_bytes;
  cast_rows_.resize(static_cast<size_t>(args_.num_tokens * (payload + scales)));
  char* first_scales = cast_rows_.data() + args_.num_tokens * payload;
  for (int64_t token = 0; token < args_.num_tokens; ++token) {
    const auto* row = reinterpret_cast<const uint16_t*>(static_cast<const char*>(args_.x) + token * args_.x_pitch);
    cast_row(row, shape_.hidden, args_.cast, args_.scale_format,
             reinterpret_cast<uint8_t*>(cast_rows_.data() + token * payload), first_scales + token * scales);
  }
  args_.x = cast_rows_.data();
  args_.x_pitch = payload;
  args_.scales = first_scales;
  args_.scales_pitch = scales;
}

Row Dispatch::input_row(int token) const {
  const auto* scales = static_cast<const char*>(args_.scales);
  return {static_cast<const char*>(args_.x) + token * args_.x_pitch,
          scales != nullptr ? scales + token * args_.scales_pitch : nullptr};
}

void Dispatch::d4_send_own_node(const Turn& turn) {
  for (int token = 0; token < args_.num_tokens; ++token) {
    slot_.place(&handle_->routes[static_cast<size_t>(token) * shape_.num_topk], input_row(token), !cached_);
  }
  transport_.signal_node(turn, Region::kSentFlag, transport_.local_rank(), Tag::word(turn.epoch, tag_));
}

void Dispatch::d6_arrival(const Turn& turn) {
  for (int local = 0; local < shape_.topology.ranks_per_node; ++local) {
    const int peer = transport_.neighbour(local);
    transport_.wait_tagged(turn, transport_.word(transport_.rank(), Region::kSentFlag, turn.lane, local), tag_,
                           {Step::kD6Sent, peer});
    if (shape_.topology.num_peer_nodes() == 0) continue;
    transport_.wait_tagged(turn, transport_.word(transport_.rank(), Region::kRelayedFlag, turn.lane, local), tag_,
                           {Step::kD6Relayed, peer});
  }
  if (args_.zero_padding) slot_.zero_padding(handle_->received);
  if (cached_) return;
  slot_.keep_routing(handle_->received);
  slot_.keep_routing(*result_);
}

void Dispatch::finish(const Turn& turn) { give_lane_credit(transport_, turn); }

// No peer waits for it: the slot is this rank's until it is released.
void Dispatch::d7_column_scales(const ColumnScales& columns) {
  if (columns.words != nullptr) slot_.lay_out_columns(handle_->received, columns, args_.zero_padding);
}

}  // namespace deep_a2a::cpu
