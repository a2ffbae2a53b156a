// Combine on one node where own rows have to be summed (C1b): each sum goes straight to the rank whose token it is,
// which then adds what has come (C2). Both by turns, so that what one waits for is under way.
#pragma once

#include "cuda/local_sum.cuh"
#include "cuda/stages.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class SumKind : int { kOwnRow, kPartEnd, kToken };

// One row to be summed, or a part of which this warp will sum no more rows.
struct SumItem {
  SumKind kind = SumKind::kToken;
  int idx = 0;     // of an own row: among its source's; the part; the token
  int source = 0;  // of an own row: a rank of the node
};

// The order of work. With parts of B rows, segment k is: rank rows [k * B, (k + 1) * B) of every source, then tokens
// [(k - kLag) * B, (k - kLag + 1) * B). Warps take rows and tokens as they come, so that who comes to a place in the
// order will do nothing before it. A token's row at a rank has an index no larger than the token's own, so its terms
// belong to earlier segments, on every rank: whoever keeps to the order waits for nothing that waits for him.
class SumSequence {
 public:
  // `rows_from`: by lane, own rows to be summed for each source.
  __device__ SumSequence(const Context& c, const CombineTask& t, int32_t rows_from)
      : c_(c),
        t_(t),
        rows_from_(rows_from),
        most_rows_(static_cast<int>(__reduce_max_sync(kFullWarp, rows_from))),
        places_(c.control.grid.moved_rows, num_warps(), num_rows() + num_tokens(), kFixedSums) {
    enter();
  }

  // The next item; false at the end. All lanes alike.
  __device__ bool next(SumItem& item) {
    while (true) {
      if (ended_ < min(num_parts(), kind_ == SumKind::kOwnRow ? segment_ : segment_ + 1)) {
        item = {SumKind::kPartEnd, ended_++};
        return true;
      }
      if (places_.is_over()) return false;
      item = {kind_, idx_};
      places_.advance();
      enter();
      if (item.kind == SumKind::kToken) return true;
      item.source = (c_.local_rank() + 1 + item.idx % c_.num_locals()) % c_.num_locals();  // rows go round the sources
      item.idx /= c_.num_locals();
      if (item.idx < __shfl_sync(kFullWarp, rows_from_, item.source)) return true;
    }
  }

 private:
  static constexpr int kLag = 3;        // other ranks may be behind by that many parts, and nobody waits for them
  static constexpr int kFixedSums = 8;  // who holds the next two already takes too many of few

  __device__ int num_parts() const { return (most_rows_ + (1 << t_.plan.part_shift) - 1) >> t_.plan.part_shift; }
  // With what is missing where a source has less rows than others.
  __device__ int num_rows() const { return most_rows_ * c_.num_locals(); }
  __device__ int num_tokens() const { return t_.half != Half::kSend ? t_.num_tokens : 0; }
  __device__ int rows_of_segment() const {
    const int each = c_.num_locals() << t_.plan.part_shift;
    return min(max(num_rows() - segment_ * each, 0), each);
  }
  __device__ int tokens_of_segment() const {
    const int part = segment_ - kLag;
    return part < 0 ? 0 : min(max(num_tokens() - (part << t_.plan.part_shift), 0), 1 << t_.plan.part_shift);
  }

  // What is at the warp's place.
  __device__ void enter() {
    if (places_.is_over()) {
      segment_ = num_parts();
      return;
    }
    int row = places_.row() - segment_begin_, token = row - rows_of_segment();
    while (token >= tokens_of_segment()) {
      row = token - tokens_of_segment();
      ++segment_;
      token = row - rows_of_segment();
    }
    segment_begin_ = places_.row() - row;
    kind_ = token < 0 ? SumKind::kOwnRow : SumKind::kToken;
    idx_ = token < 0 ? (segment_ * c_.num_locals() << t_.plan.part_shift) + row
                     : ((segment_ - kLag) << t_.plan.part_shift) + token;
  }

  const Context& c_;
  const CombineTask& t_;
  const int32_t rows_from_;
  const int most_rows_;  // from one source
  RowTasks places_;
  int segment_ = 0;
  int segment_begin_ = 0;  // its first place
  int ended_ = 0;          // parts
  SumKind kind_ = SumKind::kOwnRow;
  int idx_ = 0;  // of the row, round the sources, or of the token
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

  // The last warp of the last block to have added its rows of a part tells all ranks that it is there.
  __device__ void finish(const Fetched& fetched) const {
    if (fetched.item.kind != SumKind::kPartEnd) return;
    const int part = fetched.item.idx;
    if (!last_warp(c_.shared.parts[part], num_warps(), c_.control.grid.parts[part])) return;
    if (lane_idx() >= c_.num_locals()) return;
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
