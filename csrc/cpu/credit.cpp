#include "cpu/credit.hpp"

namespace deep_a2a::cpu {
namespace {

// Two words per giver, used in turn: that of an epoch is not set again before its reader has seen it, even when
// the signal of the next epoch overtakes it.
int64_t credit_idx(uint64_t epoch, const Topology& topology, int giver) {
  return static_cast<int64_t>(epoch & 1) * topology.num_ranks + giver;
}

}  // namespace

void wait_lane_credit(Transport& transport, const Turn& turn, Step step) {
  const uint64_t previous = turn.epoch - 1;
  const auto wait = [&](int peer) {
    const int64_t idx = credit_idx(previous, transport.topology(), peer);
    transport.wait(turn, transport.word(transport.rank(), Region::kLaneCredit, turn.lane, idx), previous, {step, peer});
  };
  for (int local = 0; local < transport.topology().ranks_per_node; ++local) wait(transport.neighbour(local));
  for (int stream = 0; stream < transport.topology().num_peer_nodes(); ++stream) wait(transport.rail_peer(stream));
}

void wait_rows_read(Transport& transport, const Turn& turn, Step step) {
  for (int local = 0; local < transport.topology().ranks_per_node; ++local) {
    const int peer = transport.neighbour(local);
    const int64_t idx = credit_idx(turn.epoch, transport.topology(), peer);
    transport.wait(turn, transport.word(transport.rank(), Region::kLaneCredit, turn.lane, idx), turn.epoch,
                   {step, peer});
  }
}

void give_lane_credit(Transport& transport, const Turn& turn) {
  const int64_t idx = credit_idx(turn.epoch, transport.topology(), transport.rank());
  transport.signal_node(turn, Region::kLaneCredit, idx, turn.epoch);
  for (int stream = 0; stream < transport.topology().num_peer_nodes(); ++stream) {
    const int peer = transport.rail_peer(stream);
    transport.put_signal(peer, turn.lane, nullptr, nullptr, 0,
                         transport.word(peer, Region::kLaneCredit, turn.lane, idx), turn.epoch);
  }
}

void wait_slot_credit(Transport& transport, const Turn& turn, int slot, uint64_t releases) {
  const int locals = transport.topology().ranks_per_node;
  for (int local = 0; local < locals; ++local) {
    transport.wait(turn, transport.word(transport.rank(), Region::kSlotCredit, 0, int64_t{slot} * locals + local),
                   releases, {Step::kD0SlotCredit, transport.neighbour(local)});
  }
}

void release_slot(Transport& transport, const Turn&, int slot, uint64_t releases) {
  const int locals = transport.topology().ranks_per_node;
  for (int local = 0; local < locals; ++local) {
    const int peer = transport.neighbour(local);
    transport.signal_all_lanes(
        peer, transport.word(peer, Region::kSlotCredit, 0, int64_t{slot} * locals + transport.local_rank()), releases);
  }
}

}  // namespace deep_a2a::cpu
