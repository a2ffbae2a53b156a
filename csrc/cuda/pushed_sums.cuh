// Combine on one node where own rows have to be summed (C1b): each sum goes straight to the rank whose token it is,
// which then adds what has come (C2). Both by turns, so that what one waits for is under way.
#pragma once

#include "cuda/local_sum.cuh"
#include "cuda/stages.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class SumKind : int { kOwnRow, kPartEnd, kToken };

// One row to be summed, or the end of a part.
struct SumItem {
  SumKind kind = SumKind::kToken;
  int idx = 0;     // of an own row: among its source's; the part; the token
  int source = 0;  // of an own row: a rank of the node
};

// The order of work. With parts of B rows, segment k is: rank rows [k * B, (k + 1) * B) of every source, then tokens
// [(k - kLag) * B, (k - kLag + 1) * B), in units of kUnit, which warps take as they come. A token's row at a rank has
// an index no larger than the token's own, so its terms belong to earlier segments, on every rank: whoever keeps to the
// order waits for nothing that waits for him.
class SumSequence {
 public:
  // `rows_from`: by lane, own rows to be summed for each source.
  __device__ SumSequence(const Context& c, const CombineTask& t, int32_t rows_from)
      : c_(c),
        t_(t),
        rows_from_(rows_from),
        num_parts_(parts_of(static_cast<int>(__reduce_max_sync(kFullWarp, rows_from)))),
        units_(c.control.grid.moved_rows, num_warps(), num_segments() * units_of_segment()) {
    begin_unit();
  }

  // The units of own rows that each part has.
  __device__ int units_of_part() const { return c_.num_locals() << t_.plan.part_shift >> kUnitShift; }

  // The next item; false at the end. All lanes alike.
  __device__ bool next(SumItem& item) {
    while (!units_.is_over()) {
      item = {kind_, at_, 0};
      if (kind_ == SumKind::kPartEnd) {
        item.idx = segment_;
        next_unit();
        if (item.idx < num_parts_) return true;
        continue;
      }
      const bool ends_unit = (++at_ & (kUnit - 1)) == 0;
      if (kind_ == SumKind::kToken) {
        if (ends_unit) next_unit();
        if (item.idx >= 0 && item.idx < num_tokens()) return true;
        continue;
      }
      if (ends_unit) kind_ = SumKind::kPartEnd;
      item.source = (c_.local_rank() + 1 + item.idx % c_.num_locals()) % c_.num_locals();  // rows go round the sources
      item.idx /= c_.num_locals();
      if (item.idx < __shfl_sync(kFullWarp, rows_from_, item.source)) return true;
    }
    return false;
  }

 private:
  // Other ranks may be behind by that many parts, and nobody waits for them.
  static constexpr int kLag = 3;
  static constexpr int kUnitShift = 2;  // no part is smaller
  static constexpr int kUnit = 1 << kUnitShift;

  __device__ int num_tokens() const { return t_.half != Half::kSend ? t_.num_tokens : 0; }
  __device__ int parts_of(int rows) const { return (rows + (1 << t_.plan.part_shift) - 1) >> t_.plan.part_shift; }
  __device__ int num_segments() const { return max(num_parts_, num_tokens() > 0 ? parts_of(num_tokens()) + kLag : 0); }
  __device__ int units_of_segment() const { return units_of_part() + (1 << t_.plan.part_shift >> kUnitShift); }

  __device__ void next_unit() {
    units_.advance();
    begin_unit();
  }
  __device__ void begin_unit() {
    int unit = units_.row() - segment_ * units_of_segment();
    for (; unit >= units_of_segment() && !units_.is_over(); ++segment_) unit -= units_of_segment();
    const int token_unit = unit - units_of_part();
    kind_ = token_unit < 0 ? SumKind::kOwnRow : SumKind::kToken;
    at_ = token_unit < 0 ? (segment_ * c_.num_locals() << t_.plan.part_shift) + (unit << kUnitShift)
                         : ((segment_ - kLag) << t_.plan.part_shift) + (token_unit << kUnitShift);
  }

  const Context& c_;
  const CombineTask& t_;
  const int32_t rows_from_;
  const int num_parts_;
  RowTasks units_;
  int segment_ = 0;
  SumKind kind_ = SumKind::kOwnRow;
  int at_ = 0;  // the next of the unit
};

// The sums of one warp. The window of a rank has room for a sum from every rank of the node for each of its tokens.
class PushedSums {
 public:
  struct Fetched {
    SumItem item;
    // By lane, -1 for none. Of an own row: the slot's expert row; of a token: its place at the rank.
    int32_t index = -1;
    float weight = 1.0f;
  };

  __device__ PushedSums(const Context& c, const CombineTask& t)
      : c_(c),
        t_(t),
        row_bytes_(c.shape.max_payload_bytes()),
        routing_(ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing)),
        rows_from_(rows_from(c, t, lane_idx())),
        sequence_(c, t, rows_from_) {
    for (int local = 0; local < min(lane_idx(), c.num_locals()); ++local) start_of_ += rows_from(c, t, local);
  }

  __device__ bool fetch(Fetched& fetched) {
    fetched = {};
    if (!sequence_.next(fetched.item)) return false;
    if (fetched.item.kind == SumKind::kToken && lane_idx() < c_.num_locals()) {
      fetched.index = t_.source.rank_places[int64_t{fetched.item.idx} * c_.num_locals() + lane_idx()];
    } else if (fetched.item.kind == SumKind::kOwnRow) {
      const int64_t rank_row = int64_t{__shfl_sync(kFullWarp, start_of_, fetched.item.source)} + fetched.item.idx;
      if (lane_idx() >= c_.shape.num_topk) return true;
      fetched.index = routing_.expert_rows[rank_row * c_.shape.num_topk + lane_idx()];
      if (t_.args.weighted) fetched.weight = routing_.topk_weights[rank_row * c_.shape.num_topk + lane_idx()];
    }
    return true;
  }

  __device__ bool prepare(const Fetched& fetched, Sum& sum) {
    const int idx = fetched.item.idx;
    if (fetched.item.kind == SumKind::kOwnRow) {  // a lane for each top-k slot
      const char* row = static_cast<const char*>(t_.args.rows) + fetched.index * row_bytes_;
      sum = weighted_sum_of(fetched.index >= 0 ? row : nullptr, fetched.weight,
                            sum_at(fetched.item.source, c_.local_rank(), idx));
    } else if (fetched.item.kind == SumKind::kToken) {  // a lane for each rank, ascending
      if (!wait_ready(part_of(fetched.index))) return false;
      const char* row = fetched.index >= 0 ? sum_at(c_.local_rank(), lane_idx(), fetched.index) : nullptr;
      sum = sum_of(row, static_cast<char*>(t_.args.out) + idx * row_bytes_);
    }
    return true;
  }

  // The warp that adds the last unit of a part's rows tells all ranks that the part is there.
  __device__ void finish(const Fetched& fetched) const {
    if (fetched.item.kind != SumKind::kPartEnd) return;
    const int part = fetched.item.idx;
    bool last = false;
    __syncwarp();
    if (lane_idx() == 0) {
      last = grid_arrive(c_.control.grid.parts[part]) == static_cast<uint32_t>(sequence_.units_of_part()) - 1;
    }
    last = __any_sync(kFullWarp, last) != 0;
    __syncwarp();
    if (!last || lane_idx() >= c_.num_locals()) return;
    const int64_t idx = int64_t{c_.local_rank()} * kMaxReadyParts + part;
    signal(c_.team, c_.word(lane_idx(), Region::kReadyPart, c_.lane, idx), Tag::word(c_.epoch, c_.tag));
  }

 private:
  // Own rows to be summed for a rank of the node.
  __device__ static int32_t rows_from(const Context& c, const CombineTask& t, int local) {
    if (t.half == Half::kReceive || local >= c.num_locals()) return 0;
    return ReceivedCounts::at(c.shape, t.kept.counts).rows_per_rank[c.neighbour(local)];
  }

  // Where the sum of a rank's row lies in the window of the token's rank.
  __device__ char* sum_at(int window_of, int from, int place) const {
    const int64_t idx = int64_t{from} * c_.shape.max_tokens + place;
    return c_.region(window_of, Region::kCombineRows, c_.lane) + idx * row_bytes_;
  }

  // In which a token has its row at the lane's rank, and the word that tells of it.
  __device__ int part_of(int place) const { return place >= 0 ? place >> t_.plan.part_shift : -1; }
  __device__ const uint64_t* part_word(int part) const {
    return c_.own_word(Region::kReadyPart, int64_t{lane_idx()} * kMaxReadyParts + part);
  }

  // For the parts of a token; tokens ascend, so parts do. False where the kernel has to be left.
  __device__ bool wait_ready(int part) {
    if (!__any_sync(kFullWarp, part > seen_)) return true;
    const bool ok = part <= seen_ || wait_epoch(c_, part_word(part), Step::kC2Gather, c_.neighbour(lane_idx())) != 0;
    seen_ = max(seen_, part);
    __syncwarp();
    return __all_sync(kFullWarp, ok) != 0;
  }

  const Context& c_;
  const CombineTask& t_;
  const int64_t row_bytes_;
  const ReceivedRouting routing_;
  const int32_t rows_from_;  // by lane, as rows_from()
  SumSequence sequence_;
  int32_t start_of_ = 0;  // the first own row for the lane's rank
  int seen_ = -1;         // the last part of the lane's rank that is known to be there
};

}  // namespace deep_a2a::cuda
