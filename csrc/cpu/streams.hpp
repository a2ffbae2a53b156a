// Streams of rows between rail peers: written chunk by chunk, drained chunk by chunk in order of arrival.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/transport.hpp"

namespace deep_a2a::cpu {

// Where a stream starts in net_in and net_out.
inline int64_t stream_offset(const Shape& shape, int stream) {
  return int64_t{stream} * shape.max_tokens * StreamRow::max_bytes(shape);
}

// The rows that this rank sends to one other node, through its rail peer there.
class OutStream {
 public:
  OutStream(Transport& transport, const Turn& turn, int stream, uint32_t tag, int64_t row_bytes, int num_rows)
      : transport_(transport),
        turn_(turn),
        tag_(tag),
        peer_(transport.rail_peer(stream)),
        stream_at_peer_(transport.stream_at_peer(stream)),
        rows_per_chunk_(rows_per_chunk(transport.shape())),
        row_bytes_(row_bytes),
        num_rows_(num_rows),
        out_(transport.region(transport.rank(), Region::kNetOut, turn.lane) + stream_offset(transport.shape(), stream)),
        in_(transport.region(peer_, Region::kNetIn, turn.lane) + stream_offset(transport.shape(), stream_at_peer_)) {}

  int num_written() const { return num_written_; }
  char* next_row() const { return out_ + num_written_ * row_bytes_; }

  // The row is complete; puts its chunk once that is full, or the stream at its end.
  void row_written() {
    ++num_written_;
    if (num_written_ % rows_per_chunk_ != 0 && num_written_ != num_rows_) return;
    const int chunk = (num_written_ - 1) / rows_per_chunk_;
    const int64_t start = int64_t{chunk} * rows_per_chunk_ * row_bytes_;
    const int64_t word = int64_t{stream_at_peer_} * max_chunks(transport_.shape()) + chunk;
    transport_.put_signal(peer_, turn_.lane, in_ + start, out_ + start, num_written_ * row_bytes_ - start,
                          transport_.word(peer_, Region::kChunkFlag, turn_.lane, word), Tag::word(turn_.epoch, tag_));
  }

 private:
  Transport& transport_;
  const Turn turn_;
  const uint32_t tag_;
  const int peer_;
  const int stream_at_peer_;
  const int rows_per_chunk_;
  const int64_t row_bytes_;
  const int num_rows_;
  char* out_;
  char* in_;
  int64_t num_written_ = 0;
};

inline const uint64_t* chunk_word(const Transport& transport, const Turn& turn, int stream, int chunk) {
  return transport.word(transport.rank(), Region::kChunkFlag, turn.lane,
                        int64_t{stream} * max_chunks(transport.shape()) + chunk);
}

// Calls use(stream, first_row, end_row) for every chunk that has arrived, until rows_of(stream) rows of each stream
// have. Tags are compared with `tag`, if there is one.
template <class RowsOf, class Use>
void drain_streams(Transport& transport, const Turn& turn, Step step, std::optional<uint32_t> tag, RowsOf&& rows_of,
                   Use&& use) {
  const int num_streams = transport.topology().num_peer_nodes();
  const int chunk_rows = rows_per_chunk(transport.shape());
  std::vector<int> done(static_cast<size_t>(num_streams), 0);  // rows
  std::vector<Transport::Condition> missing;
  while (true) {
    missing.clear();
    for (int stream = 0; stream < num_streams; ++stream) {
      const int rows = rows_of(stream);
      while (done[stream] < rows) {
        const uint64_t* word = chunk_word(transport, turn, stream, done[stream] / chunk_rows);
        const Awaited awaited{step, transport.rail_peer(stream)};
        if (load_acquire(word) < Tag::word(turn.epoch, 0)) {
          missing.push_back({word, Tag::word(turn.epoch, 0), awaited, true});
          break;
        }
        if (tag) transport.wait_tagged(turn, word, *tag, awaited);
        const int end = std::min(done[stream] + chunk_rows, rows);
        use(stream, done[stream], end);
        done[stream] = end;
      }
    }
    if (missing.empty()) return;
    transport.wait_any(turn, missing);
  }
}

}  // namespace deep_a2a::cpu
