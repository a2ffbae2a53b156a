// What crosses between ranks, byte for byte: row formats, route entries, count vectors, chunks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.hpp"
#include "protocol/shape.hpp"

namespace deep_a2a {

// One top-k slot of a token. On its way to a relay the rows are places (relative to the source); with the bases added
// they are final rows. `expert` is -1 for a slot that has no expert, or none on the node that this row goes to.
struct RouteEntry {
  int32_t expert;
  float weight;
  int32_t rank_row;
  int32_t expert_row;
};
static_assert(sizeof(RouteEntry) == 16 && offsetof(RouteEntry, expert_row) == 12);

// The routing of one rank row, from its source: for each top-k slot of the token the expert (or -1), its weight and,
// unless rows are per rank, its row; on GPUs its place, to which the receiver adds the base. The same for all ranks
// that get the token: each looks for its own experts.
struct RouteRecord {
  int32_t* experts;
  float* weights;
  int32_t* expert_rows;  // null in layout kRank
  int32_t* from_row;     // null in layout kRank: where a receiver that pulls the row finds it, its index at the source

  DEEP_A2A_HOST_DEVICE static int64_t bytes(const Shape& s) {
    const int64_t words = s.row_per_expert() ? 3 * s.num_topk + 1 : 2 * s.num_topk;
    return align_up<int64_t>(words * 4, kRowAlignment);
  }
  DEEP_A2A_HOST_DEVICE static RouteRecord at(const Shape& s, void* base) {
    auto* words = static_cast<int32_t*>(base);
    auto* weights = reinterpret_cast<float*>(words + s.num_topk);
    if (!s.row_per_expert()) return {words, weights, nullptr, nullptr};
    return {words, weights, words + 2 * s.num_topk, words + 3 * s.num_topk};
  }
};

// What one rank was asked to do; all ranks compare these before a row reaches a slot.
struct CountHeader {
  int32_t num_tokens;
  int32_t payload_bytes;
  int32_t scale_bytes;
  int32_t tag;        // see Tag
  int32_t bad_token;  // first token with an expert index out of range, or -1
  int32_t bad_topk;   // its top-k slot
  int64_t bad_expert;
};
static_assert(sizeof(CountHeader) == 32 && offsetof(CountHeader, bad_expert) == 24);

// Flags that stand for data carry, below the epoch, what their setter was asked to do. Whoever acquires one compares it
// with its own call: this is all the agreement that cached dispatches and combines have. With several rounds a chunk's
// word also says how many rows the chunk's round has in the stream.
struct Tag {
  static constexpr int kBits = 16;
  static constexpr int kRowBits = 12;

  DEEP_A2A_HOST_DEVICE static uint32_t dispatch(int slot, int format_code, bool cached) {
    return static_cast<uint32_t>(slot) << 8 | static_cast<uint32_t>(format_code) << 1 | (cached ? 1u : 0u);
  }
  // `part_shift`: what ranks on GPUs understand by a part of their own sums.
  DEEP_A2A_HOST_DEVICE static uint32_t combine(bool with_side, int part_shift = 0) {
    return 1u << 15 | static_cast<uint32_t>(part_shift) << 1 | (with_side ? 1u : 0u);
  }
  DEEP_A2A_HOST_DEVICE static uint64_t word(uint64_t epoch, uint32_t tag, int rows = 0) {
    return epoch << (kBits + kRowBits) | static_cast<uint64_t>(rows) << kBits | tag;
  }
  DEEP_A2A_HOST_DEVICE static uint32_t of(uint64_t word) { return static_cast<uint32_t>(word & ((1u << kBits) - 1)); }
  DEEP_A2A_HOST_DEVICE static int rows_of(uint64_t word) {
    return static_cast<int>(word >> kBits & ((1u << kRowBits) - 1));
  }
  DEEP_A2A_HOST_DEVICE static uint64_t epoch_of(uint64_t word) { return word >> (kBits + kRowBits); }
  DEEP_A2A_HOST_DEVICE static int slot(uint32_t tag) { return static_cast<int>(tag >> 8 & (kMaxSlots - 1)); }
};
static_assert(kMaxSlots == 64, "a tag has 6 bits for the slot");
static_assert(kMaxRoundTokens < 1 << Tag::kRowBits);

// A count vector: the header, then rows per node, per rank and per expert, all as int32.
struct CountVector {
  CountHeader* header;
  int32_t* node_rows;
  int32_t* rank_rows;
  int32_t* expert_rows;

  DEEP_A2A_HOST_DEVICE static int64_t bytes(const Shape& s) {
    const int64_t counts = int64_t{s.topology.num_nodes()} + s.topology.num_ranks + s.num_experts;
    return align_up<int64_t>(static_cast<int64_t>(sizeof(CountHeader)) + counts * 4, kRowAlignment);
  }
  DEEP_A2A_HOST_DEVICE static CountVector at(const Shape& s, void* base) {
    auto* counts = reinterpret_cast<int32_t*>(static_cast<char*>(base) + sizeof(CountHeader));
    return {static_cast<CountHeader*>(base), counts, counts + s.topology.num_nodes(),
            counts + s.topology.num_nodes() + s.topology.num_ranks};
  }
};

// One int32 of a count vector as the ranks of a node exchange it on GPUs: the lower half of its epoch lies above it.
struct CountWord {
  DEEP_A2A_HOST_DEVICE static constexpr uint64_t make(uint64_t epoch, int32_t value) {
    return epoch << 32 | static_cast<uint32_t>(value);
  }
  DEEP_A2A_HOST_DEVICE static constexpr int32_t value(uint64_t word) {
    return static_cast<int32_t>(static_cast<uint32_t>(word));
  }
  // The epoch, which is less than 2^31 away from `near`.
  DEEP_A2A_HOST_DEVICE static constexpr uint64_t epoch(uint64_t word, uint64_t near) {
    const auto ahead = static_cast<int32_t>(static_cast<uint32_t>(word >> 32) - static_cast<uint32_t>(near));
    return near + static_cast<uint64_t>(int64_t{ahead});
  }
};
static_assert(CountWord::value(CountWord::make(7, -1)) == -1 && CountWord::epoch(CountWord::make(7, -1), 9) == 7);
static_assert(CountWord::epoch(CountWord::make((uint64_t{1} << 32) - 1, 3), uint64_t{1} << 32) ==
              (uint64_t{1} << 32) - 1);
static_assert(CountWord::epoch(CountWord::make(uint64_t{5} << 32, 3), uint64_t{5} << 32) == uint64_t{5} << 32);

// The bytes of one row of `x`, opaque to the protocol.
struct RowFormat {
  int32_t payload_bytes = 0;
  int32_t scale_bytes = 0;  // 0 where the format has no scales
  int32_t code = 0;         // what the bytes mean, 0 to 63; only compared between ranks

  // From one row's scales to the next, in a window; and what a copy of one row's moves.
  DEEP_A2A_HOST_DEVICE int32_t scale_pitch() const { return align_up<int32_t>(scale_bytes, kScaleAlignment); }
  DEEP_A2A_HOST_DEVICE int32_t scale_span() const { return align_up<int32_t>(scale_bytes, kRowAlignment); }
};

// Beside a format's code in a tag: the source makes the rows from others.
constexpr int kCastCode = 64;

// One row of a stream between rail peers: payload, then side bytes, then route entries, each in whole 16 bytes.
struct StreamRow {
  int64_t side_offset;
  int64_t routes_offset;
  int64_t bytes;

  DEEP_A2A_HOST_DEVICE static StreamRow make(int64_t payload_bytes, int64_t side_bytes, int num_routes) {
    const int64_t side = align_up<int64_t>(payload_bytes, kRowAlignment);
    const int64_t routes = side + align_up<int64_t>(side_bytes, kRowAlignment);
    return {side, routes, routes + int64_t{num_routes} * static_cast<int64_t>(sizeof(RouteEntry))};
  }
  DEEP_A2A_HOST_DEVICE static StreamRow dispatch(const Shape& s, const RowFormat& format, bool cached) {
    return make(format.payload_bytes, format.scale_bytes, cached ? 0 : s.num_topk);
  }
  DEEP_A2A_HOST_DEVICE static StreamRow combine(const Shape& s, bool with_side) {
    return make(s.max_payload_bytes(), with_side ? int64_t{s.num_topk} * 4 : 0, 0);
  }
  DEEP_A2A_HOST_DEVICE static int64_t max_bytes(const Shape& s) {
    return make(s.max_payload_bytes(), s.max_scale_bytes(), s.num_topk).bytes;
  }
};

DEEP_A2A_HOST_DEVICE inline int rows_per_chunk(const Shape& s) {
  const int64_t rows = s.chunk_bytes / StreamRow::max_bytes(s);
  return static_cast<int>(rows < 1 ? 1 : rows > s.tokens_per_round() ? s.tokens_per_round() : rows);
}
// Own sums (C1b) become readable in at most that many parts.
constexpr int kMaxReadyParts = 64;

DEEP_A2A_HOST_DEVICE inline int chunks_per_round(const Shape& s) {
  return ceil_div(s.tokens_per_round(), rows_per_chunk(s));
}
// Of a stream in one operation: a word for each, the chunks of a round side by side.
DEEP_A2A_HOST_DEVICE inline int max_chunks(const Shape& s) { return s.num_rounds() * chunks_per_round(s); }

}  // namespace deep_a2a
