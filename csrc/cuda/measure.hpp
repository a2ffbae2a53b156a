// What benchmarks need on a stream: a gate, a barrier of ranks, and the plainest copies that reach the link's ceiling.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/team.hpp"
#include "cuda/window.hpp"

namespace deep_a2a::cuda {

enum class Direction : int { kPush = 0, kPull = 1 };

// Memory of a set of ranks for measurements: the first bytes of each window hold flags, the rest is copied around.
class Meter {
 public:
  static constexpr int64_t kFlagBytes = 4096;

  // `windows` by rank, all of one size.
  Meter(int rank, int device, std::vector<std::shared_ptr<Window>> windows, double timeout_s);
  ~Meter();
  Meter(const Meter&) = delete;
  Meter& operator=(const Meter&) = delete;

  // Holds the stream until open() is called on the host, then until the streams of all ranks have come as far.
  void hold(cudaStream_t stream);
  void open();
  // Copies `bytes` to or from every other rank, all at once, on `num_sms` SMs. Pieces of a row's size, as dispatch has.
  void copy_all_to_all(cudaStream_t stream, Direction direction, int64_t bytes, int num_sms);
  // Whether a wait has passed its deadline: then what was measured means nothing.
  bool late() const;

 private:
  const int rank_;
  const int device_;
  const std::vector<std::shared_ptr<Window>> windows_;
  const uint64_t timeout_ns_;
  uint64_t holds_ = 0;
  uint64_t* pinned_ = nullptr;  // holds opened so far; then whether a wait was late
};

}  // namespace deep_a2a::cuda
