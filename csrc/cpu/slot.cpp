#include "cpu/slot.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/copy.hpp"

namespace deep_a2a::cpu {
namespace {

// Calls use(first_row, end_row) for what each expert's group holds, or for what lies between the groups.
template <class Use>
void for_groups(const Received& received, bool padding, Use&& use) {
  for (size_t expert = 0; expert < received.rows_per_expert.size(); ++expert) {
    const int64_t first = received.expert_offsets[expert];
    const int64_t end = first + received.rows_per_expert[expert];
    if (padding) {
      use(end, int64_t{received.expert_offsets[expert + 1]});
    } else {
      use(first, end);
    }
  }
}

// A line of the caches holds as many rows of a column.
constexpr int64_t kRowsTogether = 16;

}  // namespace

Slot::Slot(Transport& transport, int lane, int slot, const RowFormat& format, bool streaming)
    : transport_(transport), shape_(transport.shape()), format_(format), streaming_(streaming) {
  for (int local = 0; local < shape_.topology.ranks_per_node; ++local) {
    const int rank = transport_.neighbour(local);
    views_.push_back({transport_.region(rank, Region::kRecvRows, slot),
                      transport_.region(rank, Region::kRecvScales, slot),
                      transport_.region(rank, Region::kRecvRoutes, lane)});
  }
}

void Slot::place(const RouteEntry* entries, const Row& row, bool with_routing) {
  const bool row_per_rank = shape_.layout == Layout::kRank;
  for (int slot = 0; slot < shape_.num_topk; ++slot) {
    const int expert = entries[slot].expert;
    if (expert < 0 || shape_.node_of_expert(expert) != transport_.node()) continue;
    const int rank = shape_.rank_of_expert(expert);
    const View& to = views_[shape_.topology.local_of(rank)];
    const bool first = std::none_of(entries, entries + slot, [&](const RouteEntry& earlier) {
      return earlier.expert >= 0 && shape_.rank_of_expert(earlier.expert) == rank;
    });
    int64_t bytes = 0;
    if (first || !row_per_rank) {
      const int64_t at = row_per_rank ? entries[slot].rank_row : entries[slot].expert_row;
      char* payload = to.rows + at * format_.payload_bytes;
      if (streaming_) {
        copy_streaming(payload, row.payload, format_.payload_bytes);
      } else {
        std::memcpy(payload, row.payload, static_cast<size_t>(format_.payload_bytes));
      }
      if (row.scales != nullptr) {
        std::memcpy(to.scales + at * format_.scale_pitch(), row.scales, static_cast<size_t>(format_.scale_bytes));
      }
      bytes += format_.payload_bytes + format_.scale_bytes;
    }
    if (first && with_routing) {
      place_routing(to, entries, entries[slot].rank_row);
      bytes += RouteRecord::bytes(shape_);
    }
    if (rank != transport_.rank()) transport_.count_shm_bytes(bytes);
  }
}

void Slot::place_routing(const View& to, const RouteEntry* entries, int64_t rank_row) {
  const RouteRecord into = record(to, rank_row);
  for (int slot = 0; slot < shape_.num_topk; ++slot) {
    into.experts[slot] = entries[slot].expert;
    into.weights[slot] = entries[slot].weight;
    if (into.expert_rows != nullptr) into.expert_rows[slot] = entries[slot].expert_row;
  }
}

void Slot::zero_padding(const Received& received) {
  if (shape_.layout == Layout::kRank) return;
  for_groups(received, true, [&](int64_t first, int64_t end) {
    const auto rows = static_cast<size_t>(end - first);
    std::memset(own().rows + first * format_.payload_bytes, 0, rows * static_cast<size_t>(format_.payload_bytes));
    std::memset(own().scales + first * format_.scale_pitch(), 0, rows * static_cast<size_t>(format_.scale_pitch()));
  });
}

void Slot::keep_routing(Received& received) const {
  const int topk = shape_.num_topk, experts = shape_.num_local_experts();
  const int first_expert = transport_.rank() * experts;
  for (int64_t row = 0; row < received.num_rank_rows; ++row) {
    const RouteRecord from = record(own(), row);
    for (int slot = 0; slot < topk; ++slot) {
      const int local = from.experts[slot] - first_expert;
      if (from.experts[slot] < 0 || local < 0 || local >= experts) continue;  // -1, 0 and -1 are there already
      received.topk_idx[row * topk + slot] = local;
      received.topk_weights[row * topk + slot] = from.weights[slot];
      if (from.expert_rows != nullptr) received.expert_rows[row * topk + slot] = from.expert_rows[slot];
    }
  }
}

void Slot::copy_out(const Received& received, const OwnedOutput& owned, bool with_padding) const {
  const auto copy = [&](int64_t first, int64_t end) {
    std::memcpy(static_cast<char*>(owned.rows) + first * format_.payload_bytes,
                own().rows + first * format_.payload_bytes, static_cast<size_t>((end - first) * format_.payload_bytes));
    for (int64_t row = first; owned.scales != nullptr && row < end; ++row) {
      std::memcpy(static_cast<char*>(owned.scales) + row * format_.scale_bytes,
                  own().scales + row * format_.scale_pitch(), static_cast<size_t>(format_.scale_bytes));
    }
  };
  if (shape_.layout == Layout::kRank || with_padding) {
    copy(0, received.num_rows);
  } else {
    for_groups(received, false, copy);
  }
}

void Slot::lay_out_columns(const Received& received, const ColumnScales& columns, bool with_padding) const {
  const int num_columns = ColumnScales::num_columns(format_);
  const auto lay_out = [&](int64_t first_row, int64_t num_rows, uint32_t* words) {
    for (int64_t first = 0; first < num_rows; first += kRowsTogether) {
      const int64_t end = std::min(first + kRowsTogether, num_rows);
      for (int column = 0; column < num_columns; ++column) {
        const uint32_t mask = column < num_columns - 1 ? ~uint32_t{0} : ColumnScales::last_mask(format_);
        for (int64_t row = first; row < end; ++row) {
          uint32_t word;  // whole even where the scales end within it: rows lie in whole lines
          std::memcpy(&word, own().scales + (first_row + row) * format_.scale_pitch() + column * 4, sizeof(word));
          words[column * columns.pitch + row] = word & mask;
        }
      }
    }
  };
  if (shape_.layout != Layout::kPadded) {
    lay_out(0, received.num_rows, columns.words);
    return;
  }
  for (int expert = 0; expert < shape_.num_local_experts(); ++expert) {
    lay_out(received.expert_offsets[expert], with_padding ? shape_.expert_capacity : received.rows_per_expert[expert],
            columns.words + expert * num_columns * columns.pitch);
  }
}

}  // namespace deep_a2a::cpu
