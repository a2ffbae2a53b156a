// Dispatch between nodes: rounds of rows out to the rail peers (D4), and from them to the ranks of this node (D5).
#include <algorithm>
#include <cstring>

#include "cpu/dispatch.hpp"
#include "cpu/streams.hpp"

namespace deep_a2a::cpu {

void Dispatch::d4_send_nodes(const Turn& turn, int round) {
  const int topk = shape_.num_topk, num_streams = shape_.topology.num_peer_nodes();
  std::vector<OutRound> streams;
  for (int stream = 0; stream < num_streams; ++stream) {
    const RoundStarts& starts = handle_->round_starts[stream];
    if (round >= kStagedRounds) {
      const int before = round - kStagedRounds, credits = num_chunks(shape_, round_rows(starts, before));
      wait_chunk_credit(transport_, turn, Step::kD4SendNodes, stream, before, credits);
    }
    streams.emplace_back(transport_, turn, stream, round, tag_, stream_row_.bytes, round_rows(starts, round));
  }
  if (streams.empty()) return;
  const int first_token = round * shape_.tokens_per_round();
  const int end_token = std::min(first_token + shape_.tokens_per_round(), args_.num_tokens);
  for (int token = first_token; token < end_token; ++token) {
    const size_t first = static_cast<size_t>(token) * topk;
    for (int slot = 0; slot < topk; ++slot) {
      const int32_t row = handle_->stream_rows[first + slot];
      if (row < 0) continue;
      const int to_node = shape_.node_of_expert(handle_->routes[first + slot].expert);
      const int stream = shape_.topology.stream_idx(transport_.node(), to_node);
      OutRound& out = streams[stream];
      // An earlier slot of this token went there too.
      if (row < handle_->round_starts[stream][round] + out.num_written()) continue;
      char* to = out.next_row();
      const Row input = input_row(token);
      std::memcpy(to, input.payload, static_cast<size_t>(args_.format.payload_bytes));
      if (input.scales != nullptr) {
        std::memcpy(to + stream_row_.side_offset, input.scales, static_cast<size_t>(args_.format.scale_bytes));
      }
      if (!cached_) {
        auto* routes = reinterpret_cast<RouteEntry*>(to + stream_row_.routes_offset);
        for (int k = 0; k < topk; ++k) {
          routes[k] = handle_->routes[first + k];
          if (routes[k].expert >= 0 && shape_.node_of_expert(routes[k].expert) != to_node) routes[k].expert = -1;
        }
      }
      out.row_written();
    }
  }
}

std::vector<int> Dispatch::relay_rows(int round) const {
  std::vector<int> rows;
  for (const RoundStarts& starts : handle_->relay_round_starts) {
    const bool known = cached_ || shape_.num_rounds() == 1;
    rows.push_back(known ? round_rows(starts, round) : -1);
  }
  return rows;
}

// By turns: a round that was relayed has made room for the next but one, here and at the rail peers.
void Dispatch::d5_relay(const Turn& turn) {
  if (shape_.topology.num_peer_nodes() == 0) return;
  for (int round = 0; round < shape_.num_rounds(); ++round) {
    d5_relay_round(turn, round);
    if (is_filled_again(shape_, round)) d4_send_nodes(turn, round + kStagedRounds);
  }
  transport_.signal_node(turn, Region::kRelayedFlag, transport_.local_rank(), Tag::word(turn.epoch, tag_));
}

void Dispatch::d5_relay_round(const Turn& turn, int round) {
  const char* in = transport_.region(transport_.rank(), Region::kNetIn, turn.lane);
  const int topk = shape_.num_topk;
  std::vector<int> rows = relay_rows(round);
  drain_round(transport_, turn, Step::kD5Relay, tag_, round, rows,
              [&](int stream, int chunk, int first_row, int end_row) {
                const int source = transport_.rail_peer(stream);
                const char* from = in + round_offset(shape_, stream, round, stream_row_.bytes);
                const int64_t start = handle_->relay_round_starts[stream][round];
                RouteEntry* routes = handle_->relay_routes[stream].data() + start * topk;
                for (int64_t row = first_row; row < end_row; ++row) {
                  relay_row(source, from + row * stream_row_.bytes, routes + row * topk);
                }
                if (is_filled_again(shape_, round)) give_chunk_credit(transport_, turn, stream, round, chunk);
              });
  if (cached_) return;
  for (size_t stream = 0; stream < rows.size(); ++stream) {
    RoundStarts& starts = handle_->relay_round_starts[stream];
    starts[round + 1] = starts[round] + rows[stream];
  }
}

// `routes` are the row's in the handle.
void Dispatch::relay_row(int source, const char* row, RouteEntry* routes) {
  if (!cached_) {
    std::memcpy(routes, row + stream_row_.routes_offset, sizeof(RouteEntry) * static_cast<size_t>(shape_.num_topk));
    for (int slot = 0; slot < shape_.num_topk; ++slot) {
      if (routes[slot].expert >= 0) bases_->apply(source, routes[slot]);
    }
  }
  slot_.place(routes, {row, args_.format.scale_bytes > 0 ? row + stream_row_.side_offset : nullptr}, !cached_);
}

}  // namespace deep_a2a::cpu
