// Combine, step by step as in docs/protocol.md.
#pragma once

#include <memory>
#include <vector>

#include "cpu/handle.hpp"
#include "cpu/transport.hpp"
#include "protocol/args.hpp"

namespace deep_a2a::cpu {

class Combine {
 public:
  Combine(Transport& transport, const CombineArgs& args, std::shared_ptr<const Handle> handle);

  // C0, C1 and C3 of the rounds that have room: after it, the rows of this rank are readable.
  void send(const Turn& turn);
  // C2, C4 and C5, and C3 of the other rounds: returns when the result is complete and the rows may be overwritten.
  void receive(const Turn& turn);

 private:
  // The rank rows of one token on this node, ranks ascending.
  struct NodeRows {
    const uint16_t* rows[kMaxTopk];
    int count = 0;
  };

  void c0_credit(const Turn& turn);
  void c1_ready(const Turn& turn);
  void c1b_own_rows(const Turn& turn);
  void c1_side(const Turn& turn);
  void c2_wait_ready(const Turn& turn, Step step);
  void c3_relay(const Turn& turn, int round);
  void c2_c4_sum(const Turn& turn, int round);
  void c4_give_credit(const Turn& turn, int round);

  const uint16_t* stream_row(const Turn& turn, int stream, int round, int row);
  void c4_wait_chunks(const Turn& turn, int stream, int round, int end_chunk);
  NodeRows gather(const Turn& turn, const RouteEntry* entries) const;
  // Side values of the slots whose experts are on this node, from the ranks that hold them.
  void gather_side(const Turn& turn, const RouteEntry* entries, float* side) const;
  bool on_node(int expert) const { return expert >= 0 && shape_.node_of_expert(expert) == transport_.node(); }
  int local_of_expert(int expert) const { return shape_.topology.local_of(shape_.rank_of_expert(expert)); }

  Transport& transport_;
  const Shape& shape_;
  const CombineArgs args_;
  const std::shared_ptr<const Handle> handle_;
  const uint32_t tag_;
  const StreamRow stream_row_;
  std::vector<int> chunks_seen_;  // by stream: chunks of the round known to have arrived
};

}  // namespace deep_a2a::cpu
