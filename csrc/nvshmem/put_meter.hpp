// What benchmarks need across nodes: a gate and a barrier of all ranks, and the plainest puts that reach the ceiling of
// the network.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/window.hpp"
#include "protocol/topology.hpp"

namespace deep_a2a::network {

// Who moves the bytes of a chunk: a warp or one thread, by the library; or a warp with stores of its own, which needs
// memory that is mapped here.
enum class PutBy : int { kWarp = 0, kThread = 1, kStores = 2 };

struct PutLoad {
  int64_t bytes = 0;        // to each rail peer
  int64_t chunk_bytes = 0;  // of a put, whole 16 bytes
  PutBy by = PutBy::kWarp;
  int num_sms = 1;
  int num_warps = 16;  // of each, that put
};

class PutMeter {
 public:
  // Where things lie in a window, in bytes. Out and in: an area for each rail peer, in the order of
  // Topology::stream_idx.
  struct Layout {
    int64_t words_offset, out_offset, in_offset, area_bytes, bytes;
  };
  static Layout layout(const Topology& topology, int64_t bytes, int64_t chunk_bytes);

  // `window` is symmetric memory of the own rank; `pes` by rank.
  PutMeter(const Topology& topology, int rank, int device, std::shared_ptr<cuda::Window> window, std::vector<int> pes,
           double timeout_s);
  ~PutMeter();
  PutMeter(const PutMeter&) = delete;
  PutMeter& operator=(const PutMeter&) = delete;

  // Holds the stream until open() is called on the host, then until the streams of all ranks have come as far.
  void hold(cudaStream_t stream);
  void open();
  // Puts to every rail peer; the stream goes on once all rail peers' chunks have arrived here. After a hold() each
  // time.
  void put(cudaStream_t stream, const PutLoad& load);
  // Whether a wait has passed its deadline: then what was measured means nothing.
  bool late() const;

 private:
  const Topology topology_;
  const int rank_;
  const int device_;
  const std::shared_ptr<cuda::Window> window_;
  const uint64_t timeout_ns_;
  bool is_mapped_ = true;  // the memory of every rail peer
  int* pes_ = nullptr;     // on the device
  uint64_t holds_ = 0;
  uint64_t puts_ = 0;
  uint64_t* pinned_ = nullptr;  // holds opened so far; then whether a wait was late
};

}  // namespace deep_a2a::network
