// The work of combine in one sequence: own rows (C1b) and tokens (C2) by turns, so that what one waits for is under
// way.
#pragma once

#include "cuda/sum.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class SumKind : int { kOwnRow, kPartEnd, kToken };

// One row to be summed, or the end of a part.
struct SumItem {
  SumKind kind = SumKind::kToken;
  int idx = 0;     // of an own row: among its source's; the part; the token
  int source = 0;  // of an own row: a rank of the node
};

// What a ring does, in its order. With parts of B rows, segment k is: rank rows [k * B, (k + 1) * B) of every source,
// the end of part k, tokens [(k - kLag) * B, (k - kLag + 1) * B). A token's row at a rank has an index no larger than
// the token's own, so its terms belong to earlier segments, on every rank: whoever keeps to the order waits for nothing
// that waits for him.
class SumSequence {
 public:
  // `rows_from`: by lane, own rows to be summed for each source.
  __device__ SumSequence(const CombinePlan& plan, int ring, int num_locals, int local_rank, int32_t rows_from,
                         int num_tokens)
      : step_(plan.num_rings * static_cast<int>(gridDim.x)),
        num_locals_(num_locals),
        local_rank_(local_rank),
        rows_from_(rows_from),
        num_tokens_(num_tokens),
        part_shift_(plan.part_shift),
        row_(ring * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
        token_(row_) {
    const int most = static_cast<int>(__reduce_max_sync(kFullWarp, rows_from));
    num_rows_ = most * num_locals;
    num_parts_ = (most + (1 << part_shift_) - 1) >> part_shift_;
  }

  // The next item; false at the end. All lanes alike.
  __device__ bool next(SumItem& item) {
    while (true) {
      if (row_ < min(num_rows_, (segment_ + 1 << part_shift_) * num_locals_)) {
        if (next_own_row(item)) return true;
      } else if (ended_ <= segment_ && ended_ < num_parts_) {
        item = {SumKind::kPartEnd, ended_++, 0};
        return true;
      } else if (token_ < min(num_tokens_, segment_ + 1 - kLag << part_shift_)) {
        item = {SumKind::kToken, token_, 0};
        token_ += step_;
        return true;
      } else if (ended_ >= num_parts_ && token_ >= num_tokens_) {
        return false;
      } else {
        ++segment_;
      }
    }
  }

 private:
  // Other ranks may be behind by that many parts, and nobody waits for them.
  static constexpr int kLag = 8;

  // Rows go round the sources.
  __device__ bool next_own_row(SumItem& item) {
    const int source = (local_rank_ + 1 + row_ % num_locals_) % num_locals_;
    item = {SumKind::kOwnRow, row_ / num_locals_, source};
    row_ += step_;
    return item.idx < __shfl_sync(kFullWarp, rows_from_, source);
  }

  const int step_;
  const int num_locals_;
  const int local_rank_;
  const int32_t rows_from_;
  const int num_tokens_;
  const int part_shift_;
  int num_rows_;  // with what is missing where a source has less than others
  int num_parts_;
  int segment_ = 0;
  int ended_ = 0;
  int row_;
  int token_;
};

// One warp of a ring at its work.
class Sums {
 public:
  __device__ Sums(const Context& c, const CombineTask& t)
      : c_(c),
        t_(t),
        ring_(c, t.plan),
        row_bytes_(static_cast<int>(c.shape.max_payload_bytes())),
        num_tokens_(t.half != Half::kSend ? t.num_tokens : 0),
        routing_(ReceivedRouting::at(c.shape, t.kept.capacity, t.kept.routing)) {
    if (lane_idx() >= c.num_locals()) return;
    peer_rows_ = c.region(lane_idx(), Region::kCombineRows, c.lane);
    base_ = t.source.rank_bases[lane_idx()];
    if (!c.shape.row_per_expert() || t.half == Half::kReceive) return;
    const int32_t* rows = ReceivedCounts::at(c.shape, t.kept.counts).rows_per_rank;
    rows_from_ = rows[c.neighbour(lane_idx())];
    for (int local = 0; local < lane_idx(); ++local) start_of_ += rows[c.neighbour(local)];
  }

  // False where the kernel has to be left.
  __device__ bool run() {
    if (!ring_.in_use()) return true;
    SumSequence sequence(t_.plan, ring_.idx, c_.num_locals(), c_.local_rank(), rows_from_, num_tokens_);
    Work next;
    bool more = fetch(sequence, next);
    while (more) {
      const Work now = next;
      more = fetch(sequence, next);  // under way while this row is summed
      if (now.item.kind == SumKind::kPartEnd) {
        if (!ring_.loads) end_part(now.item.idx);
        continue;
      }
      const bool own = now.item.kind == SumKind::kOwnRow;
      const Term term = own ? own_term(now) : token_term(now);
      if (ring_.loads) {
        if (!own) wait_ready(now.index);
        load_row(ring_, at_, term, row_bytes_);
        continue;
      }
      char* out = own ? own_out(now.item) : token_out(now.item);
      if (own && t_.args.weighted) {
        add_row<Weighting::kByTerm>(ring_, at_, term, out, row_bytes_);
      } else {
        add_row<Weighting::kNone>(ring_, at_, term, out, row_bytes_);
      }
    }
    return !aborted_;
  }

 private:
  // A row with what memory says of it, as it was loaded: whoever looks at that has to wait for it.
  struct Work {
    SumItem item;
    // By lane, -1 for none. Of an own row: the slot's expert row; of a token: its place at the rank.
    int32_t index = -1;
    float weight = 1.0f;
  };

  __device__ bool fetch(SumSequence& sequence, Work& work) const {
    if (!sequence.next(work.item)) return false;
    work.index = -1;
    if (work.item.kind == SumKind::kPartEnd) return true;
    if (work.item.kind == SumKind::kToken) {
      if (lane_idx() >= c_.num_locals()) return true;
      work.index = t_.source.rank_places[int64_t{work.item.idx} * c_.num_locals() + lane_idx()];
    } else {
      const int64_t entry = rank_row_of(work.item) * c_.shape.num_topk + lane_idx();
      if (lane_idx() >= c_.shape.num_topk) return true;
      work.index = routing_.expert_rows[entry];
      work.weight = routing_.topk_weights[entry];
    }
    return true;
  }

  __device__ int64_t rank_row_of(const SumItem& own) const {
    return int64_t{__shfl_sync(kFullWarp, start_of_, own.source)} + own.idx;
  }
  // C1b: a lane for each top-k slot.
  __device__ Term own_term(const Work& work) const {
    if (work.index < 0) return {};
    return {static_cast<const char*>(t_.args.rows) + int64_t{work.index} * row_bytes_, work.weight};
  }
  __device__ char* own_out(const SumItem& own) const {
    return c_.own(Region::kCombineRows, c_.lane) + rank_row_of(own) * row_bytes_;
  }
  // C2: a lane for each rank of the node, ascending.
  __device__ Term token_term(const Work& work) const {
    if (work.index < 0) return {};
    return {peer_rows_ + int64_t{base_ + work.index} * row_bytes_};
  }
  __device__ char* token_out(const SumItem& token) const {
    return static_cast<char*>(t_.args.out) + int64_t{token.idx} * row_bytes_;
  }

  // The last warp of the last block to have added its rows of a part tells all ranks that it is readable.
  __device__ void end_part(int part) const {
    if (!last_warp(c_.shared.parts[part], ring_.plan.num_rings, c_.control.grid.parts[part])) return;
    if (lane_idx() >= c_.num_locals()) return;
    const int64_t idx = int64_t{c_.local_rank()} * kMaxReadyParts + part;
    signal(c_.team, c_.word(lane_idx(), Region::kReadyPart, c_.lane, idx), Tag::word(c_.epoch, c_.tag));
  }

  // For the parts in which a token has its rows; tokens ascend, so parts do. After a wait that failed the loads go
  // on, of rows that mean nothing: the adding warps must not be left alone.
  __device__ void wait_ready(int place) {
    const int part = place >= 0 ? place >> t_.plan.part_shift : -1;
    if (c_.shape.row_per_expert() && part > seen_ && !aborted_) {
      const uint64_t* word = c_.own_word(Region::kReadyPart, int64_t{lane_idx()} * kMaxReadyParts + part);
      aborted_ = !wait_epoch(c_, word, Step::kC2Gather, c_.neighbour(lane_idx()));
      seen_ = part;
      ptx::fence_proxy_async_global();  // acquired by an ordinary load, read by bulk loads
    }
    __syncwarp();
  }

  const Context& c_;
  const CombineTask& t_;
  const SumRing ring_;
  const int row_bytes_;
  const int num_tokens_;
  const ReceivedRouting routing_;
  const char* peer_rows_ = nullptr;  // of the lane's rank
  int32_t base_ = 0;                 // of this rank's rows there
  int32_t rows_from_ = 0;            // own rows to be summed for the lane's rank
  int32_t start_of_ = 0;             // the first of them
  int seen_ = -1;                    // the last part of the lane's rank that is known to be readable
  bool aborted_ = false;
  RingPosition at_;
};

}  // namespace deep_a2a::cuda
