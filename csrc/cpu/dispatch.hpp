// Dispatch, step by step as in docs/protocol.md.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/handle.hpp"
#include "cpu/plan.hpp"
#include "cpu/slot.hpp"
#include "cpu/transport.hpp"
#include "protocol/args.hpp"

namespace deep_a2a::cpu {

class Dispatch {
 public:
  // On `lane`. With `cached`, `handle` is that of an earlier dispatch and stays as it is; otherwise it is filled.
  // `slot_use` is the number of this use of the slot, from 1.
  // `result` is the caller's copy of what the handle receives, to do with as they like.
  Dispatch(Transport& transport, int lane, const DispatchArgs& args, std::shared_ptr<Handle> handle, bool cached,
           std::shared_ptr<Received> result, uint64_t slot_use);

  // D0 to D4, of the rounds that have room. Calls `on_counts` once the sizes of the result are known. Throws if the
  // dispatch is refused: then everything of it is settled, on every rank, and receive() must not follow.
  void send(const Turn& turn, const std::function<void()>& on_counts);
  // D5 to D7, and D4 of the other rounds: returns when every row has arrived, and has been copied where the result is
  // owned.
  void receive(const Turn& turn, const OwnedOutput& owned, const ColumnScales& columns);
  // Gives the slot back to the ranks that write into it.
  void release(const Turn& turn);

 private:
  void d0_credit(const Turn& turn);
  void d0_slot_credit(const Turn& turn);
  void d1_count();
  void d2_exchange(const Turn& turn);
  void d2_relay(const Turn& turn);
  void d3_bases(const Turn& turn);
  void d4_cast();
  void d4_send_nodes(const Turn& turn, int round);
  void d4_send_own_node(const Turn& turn);
  void d5_relay(const Turn& turn);
  void d5_relay_round(const Turn& turn, int round);
  void relay_row(int source, const char* row, RouteEntry* routes);
  void d6_arrival(const Turn& turn);
  void finish(const Turn& turn);
  void d7_column_scales(const ColumnScales& columns);
  void refuse(const Turn& turn, const Verdict& verdict);

  Row input_row(int token) const;
  // Rows that each rail peer sends in a round; -1 where its first chunk will tell.
  std::vector<int> relay_rows(int round) const;

  Transport& transport_;
  const Shape& shape_;
  DispatchArgs args_;
  std::shared_ptr<Handle> handle_;
  const bool cached_;
  const std::shared_ptr<Received> result_;
  const uint64_t slot_use_;
  const uint32_t tag_;
  const StreamRow stream_row_;
  Slot slot_;
  std::vector<char> counts_;     // own count vector
  std::vector<char> cast_rows_;  // FP8 input made from BF16: payloads, then scales
  std::optional<Bases> bases_;
  bool settled_ = false;  // refused: the slot has been given back
};

}  // namespace deep_a2a::cpu
