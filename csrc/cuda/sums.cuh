// The work of combine in one sequence: own rows (C1b) and tokens (C2) by turns, so that what one waits for is under
// way.
#pragma once

#include "cuda/sum.cuh"
#include "cuda/sync.cuh"

namespace deep_a2a::cuda {

enum class SumKind : int { kOwnRow, kToken };

// One row to be summed.
struct SumItem {
  SumKind kind = SumKind::kToken;
  int row = 0;     // of an own row: its index among the source's; of a token: the token
  int source = 0;  // of an own row: a rank of the node
};

// What a pair does, in its order. Segment k: rank rows [k * B, (k + 1) * B) of every source, kReadyRows of one source
// at a time, then tokens [(k - 1) * B, k * B). A token's row at a rank has an index no larger than the token's own, so
// its terms belong to earlier segments, on every rank: whoever keeps to the order waits for nothing that waits for him.
class SumSequence {
 public:
  // `rows_from`: by lane, own rows to be summed for each source.
  __device__ SumSequence(const CombinePlan& plan, int pair, int num_locals, int local_rank, int32_t rows_from,
                         int num_tokens)
      : step_(plan.num_pairs * static_cast<int>(gridDim.x)),
        num_locals_(num_locals),
        local_rank_(local_rank),
        rows_from_(rows_from),
        num_tokens_(num_tokens),
        batch_tokens_(plan.batch_tokens),
        batch_units_(plan.batch_tokens / kReadyRows * num_locals),
        unit_(pair * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
        token_(unit_) {
    num_units_ = ceil_div(static_cast<int>(__reduce_max_sync(kFullWarp, rows_from)), kReadyRows) * num_locals;
  }

  // The next row; false at the end. All lanes alike.
  __device__ bool next(SumItem& item) {
    while (true) {
      if (unit_ < min(num_units_, end_of_units_ + batch_units_)) {
        if (next_own_row(item)) return true;
      } else if (token_ < min(num_tokens_, end_of_tokens_)) {
        item = {SumKind::kToken, token_, 0};
        token_ += step_;
        return true;
      } else if (unit_ >= num_units_ && token_ >= num_tokens_) {
        return false;
      } else {
        end_of_units_ += batch_units_;
        end_of_tokens_ += batch_tokens_;
      }
    }
  }

 private:
  // A unit is kReadyRows rows of one source; units go round the sources.
  __device__ bool next_own_row(SumItem& item) {
    const int source = (local_rank_ + 1 + unit_ % num_locals_) % num_locals_;
    const int row = unit_ / num_locals_ * kReadyRows + row_of_unit_;
    if (row_of_unit_ < kReadyRows && row < __shfl_sync(kFullWarp, rows_from_, source)) {
      item = {SumKind::kOwnRow, row, source};
      ++row_of_unit_;
      return true;
    }
    row_of_unit_ = 0;
    unit_ += step_;
    return false;
  }

  const int step_;
  const int num_locals_;
  const int local_rank_;
  const int32_t rows_from_;
  const int num_tokens_;
  const int batch_tokens_;
  const int batch_units_;
  int num_units_;
  int end_of_units_ = 0;   // of the segment before
  int end_of_tokens_ = 0;  // of the segment
  int unit_;
  int row_of_unit_ = 0;
  int token_;
};

// One warp of a pair at its work.
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
    SumSequence sequence(t_.plan, ring_.pair, c_.num_locals(), c_.local_rank(), rows_from_, num_tokens_);
    Work next;
    bool more = fetch(sequence, next);
    while (more) {
      const Work now = next;
      more = fetch(sequence, next);  // under way while this row is summed
      const bool own = now.item.kind == SumKind::kOwnRow;
      const Weighting weighting = own && t_.args.weighted ? Weighting::kByTerm : Weighting::kNone;
      const Term term = own ? own_term(now) : token_term(now);
      char* out = own ? own_out(now.item) : token_out(now.item);
      if (!own && ring_.loads) wait_ready(now.index);
      for (int offset = 0; offset < row_bytes_; offset += t_.plan.chunk_bytes) {
        sum_chunk(ring_, at_, term, weighting, offset, min(t_.plan.chunk_bytes, row_bytes_ - offset), out + offset);
      }
      if (own && !ring_.loads) tell_ready(now.item);
    }
    return !aborted_;
  }

 private:
  // A row with what memory says of it, as it was loaded: whoever looks at that has to wait for it.
  struct Work {
    SumItem item;
    int32_t index =
        -1;  // by lane, -1 for none. Of an own row: the slot's expert row; of a token: its place at the rank
    float weight = 1.0f;
  };

  __device__ bool fetch(SumSequence& sequence, Work& work) const {
    if (!sequence.next(work.item)) return false;
    work.index = -1;
    if (work.item.kind == SumKind::kToken) {
      if (lane_idx() >= c_.num_locals()) return true;
      work.index = t_.source.rank_places[int64_t{work.item.row} * c_.num_locals() + lane_idx()];
    } else {
      const int64_t entry = rank_row_of(work.item) * c_.shape.num_topk + lane_idx();
      if (lane_idx() >= c_.shape.num_topk) return true;
      work.index = routing_.expert_rows[entry];
      work.weight = routing_.topk_weights[entry];
    }
    return true;
  }

  __device__ int64_t rank_row_of(const SumItem& own) const {
    return int64_t{__shfl_sync(kFullWarp, start_of_, own.source)} + own.row;
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
    return static_cast<char*>(t_.args.out) + int64_t{token.row} * row_bytes_;
  }

  // After the last row of those that have a flag together. This warp has written them all.
  __device__ void tell_ready(const SumItem& item) const {
    const int rows = __shfl_sync(kFullWarp, rows_from_, item.source);
    const bool last = item.row % kReadyRows == kReadyRows - 1 || item.row == rows - 1;
    if (!last) return;
    __syncwarp();
    if (lane_idx() != 0) return;
    const int64_t idx = int64_t{c_.local_rank()} * max_ready_chunks(c_.shape) + item.row / kReadyRows;
    signal(c_.team, c_.word(item.source, Region::kReadyChunk, c_.lane, idx), Tag::word(c_.epoch, c_.tag));
  }

  // Tokens ascend, so the rows of each lane do. After a wait that failed the loads go on, of rows that mean nothing:
  // the adding warp must not be left alone.
  __device__ void wait_ready(int place) {
    const int chunk = place >= 0 ? place / kReadyRows : -1;
    if (c_.shape.row_per_expert() && chunk > seen_ && !aborted_) {
      const int64_t idx = int64_t{lane_idx()} * max_ready_chunks(c_.shape) + chunk;
      const uint64_t* word = c_.own_word(Region::kReadyChunk, idx);
      aborted_ = !wait(c_, word, Tag::word(c_.epoch, 0), Step::kC2Gather, c_.neighbour(lane_idx()));
      seen_ = chunk;
      ptx::fence_proxy_async();  // acquired by an ordinary load, read by bulk loads
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
  int seen_ = -1;                    // the last rows of the lane's rank that are known to be ready
  bool aborted_ = false;
  RingPosition at_;
};

}  // namespace deep_a2a::cuda
