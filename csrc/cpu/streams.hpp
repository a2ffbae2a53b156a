// Streams of rows between rail peers, in rounds: written chunk by chunk, drained chunk by chunk in order of arrival.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/transport.hpp"

namespace deep_a2a::cpu {

// A round of a stream has as many rows as its first chunk says. Where there is one round, counts and handles say it.
inline bool chunks_tell_rows(const Shape& shape) { return shape.num_rounds() > 1; }

// Of a round of so many rows. Where chunks tell, there is always one to tell.
inline int num_chunks(const Shape& shape, int rows) {
  return std::max(ceil_div(rows, rows_per_chunk(shape)), chunks_tell_rows(shape) ? 1 : 0);
}

// Whether the room of a round will be filled again, so that its reader has to give it back.
inline bool is_filled_again(const Shape& shape, int round) { return round + kStagedRounds < shape.num_rounds(); }

// Where a round of a stream starts in net_in and net_out.
inline int64_t round_offset(const Shape& shape, int stream, int round, int64_t row_bytes) {
  return int64_t{stream} * shape.staged_rows() * StreamRow::max_bytes(shape) +
         shape.first_staged_row(round) * row_bytes;
}

inline int64_t chunk_idx(const Shape& shape, int stream, int round, int chunk) {
  return int64_t{stream} * max_chunks(shape) + int64_t{round} * chunks_per_round(shape) + chunk;
}

inline const uint64_t* chunk_word(const Transport& transport, const Turn& turn, int stream, int round, int chunk) {
  return transport.word(transport.rank(), Region::kChunkFlag, turn.lane,
                        chunk_idx(transport.shape(), stream, round, chunk));
}

// The rows of one round that this rank sends to one other node, through its rail peer there.
class OutRound {
 public:
  OutRound(Transport& transport, const Turn& turn, int stream, int round, uint32_t tag, int64_t row_bytes, int num_rows)
      : transport_(transport),
        turn_(turn),
        round_(round),
        tag_(tag),
        peer_(transport.rail_peer(stream)),
        stream_at_peer_(transport.stream_at_peer(stream)),
        rows_per_chunk_(rows_per_chunk(transport.shape())),
        row_bytes_(row_bytes),
        num_rows_(num_rows),
        out_(transport.region(transport.rank(), Region::kNetOut, turn.lane) +
             round_offset(transport.shape(), stream, round, row_bytes)),
        in_(transport.region(peer_, Region::kNetIn, turn.lane) +
            round_offset(transport.shape(), stream_at_peer_, round, row_bytes)) {
    if (num_rows == 0 && chunks_tell_rows(transport.shape())) put(0, 0);
  }

  int num_written() const { return num_written_; }
  char* next_row() const { return out_ + num_written_ * row_bytes_; }

  // The row is complete; puts its chunk once that is full, or the round at its end.
  void row_written() {
    ++num_written_;
    if (num_written_ % rows_per_chunk_ == 0 || num_written_ == num_rows_) {
      const int chunk = (num_written_ - 1) / rows_per_chunk_;
      put(chunk, num_written_ - chunk * rows_per_chunk_);
    }
  }

 private:
  void put(int chunk, int rows) {
    const int64_t start = int64_t{chunk} * rows_per_chunk_ * row_bytes_;
    uint64_t* word = transport_.word(peer_, Region::kChunkFlag, turn_.lane,
                                     chunk_idx(transport_.shape(), stream_at_peer_, round_, chunk));
    transport_.put_signal(peer_, turn_.lane, in_ + start, out_ + start, rows * row_bytes_, word,
                          Tag::word(turn_.epoch, tag_, chunks_tell_rows(transport_.shape()) ? num_rows_ : 0));
  }

  Transport& transport_;
  const Turn turn_;
  const int round_;
  const uint32_t tag_;
  const int peer_;
  const int stream_at_peer_;
  const int rows_per_chunk_;
  const int64_t row_bytes_;
  const int num_rows_;
  char* out_;
  char* in_;
  int num_written_ = 0;
};

// The rail peer may fill the room of a chunk that came from it.
inline void give_chunk_credit(Transport& transport, const Turn& turn, int stream, int round, int chunk) {
  const int peer = transport.rail_peer(stream);
  const int64_t idx = chunk_idx(transport.shape(), transport.stream_at_peer(stream), round, chunk);
  transport.put_signal(peer, turn.lane, nullptr, nullptr, 0, transport.word(peer, Region::kChunkCredit, turn.lane, idx),
                       turn.epoch);
}

// Until the first `credits` chunks of a round may be filled again. All that were given are waited for, also where
// fewer chunks come next: a word must not be under way when its epoch ends.
inline void wait_chunk_credit(Transport& transport, const Turn& turn, Step step, int stream, int round, int credits) {
  for (int chunk = 0; chunk < credits; ++chunk) {
    const int64_t idx = chunk_idx(transport.shape(), stream, round, chunk);
    transport.wait(turn, transport.word(transport.rank(), Region::kChunkCredit, turn.lane, idx), turn.epoch,
                   {step, transport.rail_peer(stream)});
  }
}

// Calls use(stream, chunk, first_row, end_row), rows counted from the round's first, for every chunk of a round that
// has arrived, until all have. `rows` has those of each stream; where it says -1, the first chunk tells and it is
// filled in. Tags are compared with `tag`, if there is one.
template <class Use>
void drain_round(Transport& transport, const Turn& turn, Step step, std::optional<uint32_t> tag, int round,
                 std::vector<int>& rows, Use&& use) {
  const int num_streams = transport.topology().num_peer_nodes();
  const int chunk_rows = rows_per_chunk(transport.shape());
  std::vector<int> done(static_cast<size_t>(num_streams), 0);  // chunks
  std::vector<Transport::Condition> missing;
  while (true) {
    missing.clear();
    for (int stream = 0; stream < num_streams; ++stream) {
      while (rows[stream] < 0 || done[stream] < num_chunks(transport.shape(), rows[stream])) {
        const uint64_t* word = chunk_word(transport, turn, stream, round, done[stream]);
        const Awaited awaited{step, transport.rail_peer(stream)};
        const uint64_t seen = load_acquire(word);
        if (Tag::epoch_of(seen) < turn.epoch) {
          missing.push_back({word, Tag::word(turn.epoch, 0), awaited, true});
          break;
        }
        if (tag) transport.wait_tagged(turn, word, *tag, awaited);
        if (rows[stream] < 0) rows[stream] = Tag::rows_of(seen);
        const int first = done[stream] * chunk_rows;
        use(stream, done[stream], first, std::min(first + chunk_rows, rows[stream]));
        ++done[stream];
      }
    }
    if (missing.empty()) return;
    transport.wait_any(turn, missing);
  }
}

}  // namespace deep_a2a::cpu
