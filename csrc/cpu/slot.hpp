// One slot of the windows of this node, as sources and relays write into it and as its receiver reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/handle.hpp"
#include "cpu/transport.hpp"
#include "protocol/args.hpp"
#include "protocol/column_scales.hpp"

namespace deep_a2a::cpu {

// A row on its way; `scales` is null for formats without.
struct Row {
  const char* payload;
  const char* scales;
};

class Slot {
 public:
  // For a dispatch on `lane`. `streaming`: rows are stored past the caches.
  Slot(Transport& transport, int lane, int slot, const RowFormat& format, bool streaming);

  // Stores a row to all its final rows on this node: once per destination rank, or once per expert. `with_routing` also
  // stores its entries to its rank rows. Entries of other nodes are passed over.
  void place(const RouteEntry* entries, const Row& row, bool with_routing);

  // The receiver's side, once everything has arrived.
  void zero_padding(const Received& received);
  void keep_routing(Received& received) const;
  void copy_out(const Received& received, const OwnedOutput& owned, bool with_padding) const;
  void lay_out_columns(const Received& received, const ColumnScales& columns, bool with_padding) const;

 private:
  // The slot's regions at one rank, and the lane's for the routing.
  struct View {
    char* rows;
    char* scales;
    char* routes;
  };

  void place_routing(const View& to, const RouteEntry* entries, int64_t rank_row);
  RouteRecord record(const View& view, int64_t rank_row) const {
    return RouteRecord::at(shape_, view.routes + rank_row * RouteRecord::bytes(shape_));
  }
  const View& own() const { return views_[transport_.local_rank()]; }

  Transport& transport_;
  const Shape& shape_;
  const RowFormat format_;
  const bool streaming_;
  std::vector<View> views_;  // by local rank
};

}  // namespace deep_a2a::cpu
