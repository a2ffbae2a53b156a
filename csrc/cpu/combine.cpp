#include "cpu/combine.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/credit.hpp"
#include "cpu/row_math.hpp"
#include "cpu/streams.hpp"

namespace deep_a2a::cpu {

Combine::Combine(Transport& transport, const CombineArgs& args, std::shared_ptr<const Handle> handle)
    : transport_(transport),
      shape_(transport.shape()),
      args_(args),
      handle_(std::move(handle)),
      tag_(Tag::combine(args.with_side)),
      stream_row_(StreamRow::combine(shape_, args.with_side)),
      chunks_seen_(static_cast<size_t>(shape_.topology.num_peer_nodes()), 0) {}

void Combine::send(const Turn& turn) {
  c0_credit(turn);
  c1_ready(turn);
  if (shape_.topology.num_peer_nodes() > 0) c2_wait_ready(turn, Step::kC3Relay);
  for (int round = 0; round < std::min(kStagedRounds, shape_.num_rounds()); ++round) c3_relay(turn, round);
}

void Combine::receive(const Turn& turn) {
  c2_wait_ready(turn, Step::kC2Gather);
  for (int round = 0; round < shape_.num_rounds(); ++round) {
    c2_c4_sum(turn, round);
    c4_give_credit(turn, round);
    if (is_filled_again(shape_, round)) c3_relay(turn, round + kStagedRounds);
  }
  give_lane_credit(transport_, turn);
  wait_rows_read(transport_, turn, Step::kC5CreditReturned);
}

void Combine::c0_credit(const Turn& turn) { wait_lane_credit(transport_, turn, Step::kC0Credit); }

void Combine::c1_ready(const Turn& turn) {
  char* own = transport_.region(transport_.rank(), Region::kCombineRows, turn.lane);
  if (shape_.layout != Layout::kRank) {
    c1b_own_rows(turn);
  } else if (args_.rows != own) {  // not lent
    std::memmove(own, args_.rows, static_cast<size_t>(handle_->received.num_rank_rows * shape_.max_payload_bytes()));
  }
  if (args_.with_side) c1_side(turn);
  transport_.signal_node(turn, Region::kReadyFlag, transport_.local_rank(), Tag::word(turn.epoch, tag_));
}

void Combine::c1b_own_rows(const Turn& turn) {
  auto* out = reinterpret_cast<uint16_t*>(transport_.region(transport_.rank(), Region::kCombineRows, turn.lane));
  const auto* rows = static_cast<const uint16_t*>(args_.rows);
  const int topk = shape_.num_topk;
  for (int64_t rank_row = 0; rank_row < handle_->received.num_rank_rows; ++rank_row) {
    const uint16_t* terms[kMaxTopk];
    float weights[kMaxTopk];
    int count = 0;
    for (int64_t entry = rank_row * topk; entry < (rank_row + 1) * topk; ++entry) {
      if (handle_->received.expert_rows[entry] < 0) continue;
      terms[count] = rows + int64_t{handle_->received.expert_rows[entry]} * shape_.hidden;
      weights[count++] = handle_->received.topk_weights[entry];
    }
    weigh_rows(terms, args_.weighted ? weights : nullptr, count, out + rank_row * shape_.hidden, shape_.hidden);
  }
}

void Combine::c1_side(const Turn& turn) {
  auto* out = reinterpret_cast<float*>(transport_.region(transport_.rank(), Region::kCombineSide, turn.lane));
  const int64_t entries = handle_->received.num_rank_rows * shape_.num_topk;
  if (shape_.layout == Layout::kRank) {
    std::memcpy(out, args_.side, static_cast<size_t>(entries) * sizeof(float));
    return;
  }
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int32_t row = handle_->received.expert_rows[entry];
    out[entry] = row >= 0 ? args_.side[row] : 0.0f;
  }
}

void Combine::c2_wait_ready(const Turn& turn, Step step) {
  for (int local = 0; local < shape_.topology.ranks_per_node; ++local) {
    transport_.wait_tagged(turn, transport_.word(transport_.rank(), Region::kReadyFlag, turn.lane, local), tag_,
                           {step, transport_.neighbour(local)});
  }
}

Combine::NodeRows Combine::gather(const Turn& turn, const RouteEntry* entries) const {
  int locals[kMaxTopk];
  NodeRows found;
  for (int slot = 0; slot < shape_.num_topk; ++slot) {
    if (!on_node(entries[slot].expert)) continue;
    const int local = local_of_expert(entries[slot].expert);
    const int at = static_cast<int>(std::lower_bound(locals, locals + found.count, local) - locals);
    if (at < found.count && locals[at] == local) continue;  // another slot of the same rank
    std::copy_backward(locals + at, locals + found.count, locals + found.count + 1);
    std::copy_backward(found.rows + at, found.rows + found.count, found.rows + found.count + 1);
    const char* rows = transport_.region(transport_.neighbour(local), Region::kCombineRows, turn.lane);
    locals[at] = local;
    found.rows[at] = reinterpret_cast<const uint16_t*>(rows + entries[slot].rank_row * shape_.max_payload_bytes());
    ++found.count;
    if (local != transport_.local_rank()) transport_.count_shm_bytes(shape_.max_payload_bytes());
  }
  return found;
}

void Combine::gather_side(const Turn& turn, const RouteEntry* entries, float* side) const {
  for (int slot = 0; slot < shape_.num_topk; ++slot) {
    if (!on_node(entries[slot].expert)) continue;
    const int local = local_of_expert(entries[slot].expert);
    const char* from = transport_.region(transport_.neighbour(local), Region::kCombineSide, turn.lane);
    side[slot] = reinterpret_cast<const float*>(from)[int64_t{entries[slot].rank_row} * shape_.num_topk + slot];
    if (local != transport_.local_rank()) transport_.count_shm_bytes(sizeof(float));
  }
}

void Combine::c3_relay(const Turn& turn, int round) {
  for (int stream = 0; stream < shape_.topology.num_peer_nodes(); ++stream) {
    if (round >= kStagedRounds) {
      wait_chunk_credit(transport_, turn, Step::kC3Relay, stream, round - kStagedRounds, 1);
    }
    const RoundStarts& starts = handle_->relay_round_starts[stream];
    if (starts[round] == starts[round + 1]) continue;  // the source knows
    OutRound out(transport_, turn, stream, round, tag_, stream_row_.bytes, round_rows(starts, round));
    for (int row = starts[round]; row < starts[round + 1]; ++row) {
      const RouteEntry* entries = &handle_->relay_routes[stream][static_cast<size_t>(row) * shape_.num_topk];
      const NodeRows terms = gather(turn, entries);
      add_rows({terms.rows, terms.count, 0, terms.count}, reinterpret_cast<uint16_t*>(out.next_row()), shape_.hidden);
      if (args_.with_side) {
        gather_side(turn, entries, reinterpret_cast<float*>(out.next_row() + stream_row_.side_offset));
      }
      out.row_written();
    }
  }
}

void Combine::c4_wait_chunks(const Turn& turn, int stream, int round, int end_chunk) {
  for (; chunks_seen_[stream] < end_chunk; ++chunks_seen_[stream]) {
    transport_.wait_tagged(turn, chunk_word(transport_, turn, stream, round, chunks_seen_[stream]), tag_,
                           {Step::kC4AddNodes, transport_.rail_peer(stream)});
  }
}

// C4: the partial row that a node sent back, once its chunk has arrived.
const uint16_t* Combine::stream_row(const Turn& turn, int stream, int round, int row) {
  const int row_of_round = row - handle_->round_starts[stream][round];
  c4_wait_chunks(turn, stream, round, row_of_round / rows_per_chunk(shape_) + 1);
  const char* in = transport_.region(transport_.rank(), Region::kNetIn, turn.lane);
  return reinterpret_cast<const uint16_t*>(in + round_offset(shape_, stream, round, stream_row_.bytes) +
                                           row_of_round * stream_row_.bytes);
}

// For each token of the round: the rows of the own node (C2) and the partial rows of the others (C4), nodes ascending.
void Combine::c2_c4_sum(const Turn& turn, int round) {
  const int topk = shape_.num_topk;
  auto* out = static_cast<uint16_t*>(args_.out);
  const int first_token = round * shape_.tokens_per_round();
  const int end_token = std::min(first_token + shape_.tokens_per_round(), handle_->num_tokens);
  std::fill(chunks_seen_.begin(), chunks_seen_.end(), 0);
  for (int token = first_token; token < end_token; ++token) {
    const RouteEntry* entries = &handle_->routes[static_cast<size_t>(token) * topk];
    const int32_t* stream_rows = &handle_->stream_rows[static_cast<size_t>(token) * topk];
    float* side = args_.with_side ? args_.side_out + int64_t{token} * topk : nullptr;
    if (side != nullptr) {
      std::fill(side, side + topk, 0.0f);
      gather_side(turn, entries, side);
    }

    struct Partial {
      int node;
      const uint16_t* row;
    };
    Partial partials[kMaxTopk];
    int num_partials = 0;
    for (int slot = 0; slot < topk; ++slot) {
      if (stream_rows[slot] < 0) continue;
      const int node = shape_.node_of_expert(entries[slot].expert);
      const int stream = shape_.topology.stream_idx(transport_.node(), node);
      const uint16_t* row = stream_row(turn, stream, round, stream_rows[slot]);
      if (side != nullptr) {
        side[slot] = reinterpret_cast<const float*>(reinterpret_cast<const char*>(row) + stream_row_.side_offset)[slot];
      }
      Partial* end = partials + num_partials;
      Partial* at = std::find_if(partials, end, [&](const Partial& other) { return other.node >= node; });
      if (at != end && at->node == node) continue;
      std::copy_backward(at, end, end + 1);
      *at = {node, row};
      ++num_partials;
    }

    const NodeRows own = gather(turn, entries);
    const uint16_t* terms[2 * kMaxTopk];
    int count = 0, next = 0;
    for (; next < num_partials && partials[next].node < transport_.node(); ++next) terms[count++] = partials[next].row;
    const int own_begin = count;
    for (int row = 0; row < own.count; ++row) terms[count++] = own.rows[row];
    const int own_end = count;
    for (; next < num_partials; ++next) terms[count++] = partials[next].row;
    add_rows({terms, count, own_begin, own_end}, out + int64_t{token} * shape_.hidden, shape_.hidden);
  }
}

// The tokens have asked for every row of the round.
void Combine::c4_give_credit(const Turn& turn, int round) {
  for (int stream = 0; is_filled_again(shape_, round) && stream < shape_.topology.num_peer_nodes(); ++stream) {
    give_chunk_credit(transport_, turn, stream, round, 0);
  }
}

}  // namespace deep_a2a::cpu
