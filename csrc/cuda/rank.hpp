// One rank of a buffer on a GPU: its windows, what its kernels keep, and the launches.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda/launch.hpp"
#include "cuda/stream.hpp"
#include "cuda/window.hpp"

namespace deep_a2a::cuda {

struct ReceivedSizes {
  int64_t num_rows;
  int64_t num_rank_rows;
};

struct WireBytes {
  int64_t nvlink;
  int64_t network;
};

class Rank {
 public:
  // `windows` of the ranks of the node, by local rank, the own one included.
  // With several nodes, where windows lie in symmetric memory, by node: the rail peer's number in the job, and its
  // window where rows are to be stored there, because it is mapped here; null where they are put. `delay_seed` is for
  // tests: every release comes late, as drawn from it.
  Rank(const Shape& shape, int rank, int device, std::vector<std::shared_ptr<Window>> windows,
       const std::vector<int>& rail_pes, std::vector<std::shared_ptr<Window>> rail_windows, double timeout_s,
       std::optional<uint64_t> delay_seed);
  ~Rank();
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  const Shape& shape() const { return team_.shape; }
  int num_sms() const { return limits_.num_sms; }
  int64_t source_bytes(int num_tokens) const;
  int64_t relay_bytes() const;

  // Launches a half, or both, on `launch.num_sms` SMs (0 for the default). `source` and `relay` are blocks that the
  // handle keeps, the latter with several nodes.
  // The receive half also lays the scales out by column, if `columns` has memory for them.
  // Returns a ticket for wait_counts().
  uint64_t dispatch(const Launch& launch, DispatchTask task, void* source, void* relay, const ColumnScales& columns);
  // The rows of a slot to the caller's memory, by copy engine.
  void copy_out(cudaStream_t stream, int slot, int64_t num_rows, const RowFormat& format, void* rows, void* scales);
  // `num_rows` of `args.rows`, which are copied into the window unless they lie there (layout kRank).
  void combine(const Launch& launch, CombineTask task, void* source, void* relay, int64_t num_rows);
  void release(cudaStream_t stream, int slot);

  // Blocks until the sizes of that dispatch are known. Throws what it was refused with, or what ended the buffer.
  ReceivedSizes wait_counts(int lane, uint64_t ticket, cudaStream_t stream);
  // Throws what a kernel has reported: a refusal once, of any lane, a fault for ever.
  void check();
  void check_faults();
  WireBytes wire_bytes() const;

 private:
  char* own(Region region, int instance) const;
  void check_dispatch(const DispatchTask& task) const;
  // Input that peers pull, or that bulk copies cannot read where it is, goes into the window.
  void place_input(cudaStream_t stream, DispatchTask& task);
  // Throws the refusal of a dispatch of that lane, once.
  void check_refusals(int lane);
  size_t refused_bytes() const;  // of the count vectors that a lane's refusal leaves
  std::exception_ptr fault() const;

  const int device_;
  const std::vector<std::shared_ptr<Window>> windows_, rail_windows_;
  DeviceLimits limits_;
  Team team_;
  void* mailbox_memory_ = nullptr;
  void* control_memory_ = nullptr;
  int64_t scratch_words_ = 0;  // of a lane
  int32_t* scratch_ = nullptr;
  Stream stream_;  // for reading what peers have left behind
  uint64_t tickets_ = 0;
  std::mutex refusals_;
};

}  // namespace deep_a2a::cuda
