// Memory that the runtime API has given out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace deep_a2a::emulator {

enum class MemoryKind : int { kDevice, kHost, kPeer };

struct Allocation {
  char* base = nullptr;
  size_t bytes = 0;  // mapped
  MemoryKind kind = MemoryKind::kDevice;
  int fd = -1;          // of device memory
  int pid = 0;          // whose memory it is
  uint64_t number = 0;  // of device memory, unique in its process
  int uses = 1;         // of peer memory: how often it is open
};

class Allocations {
 public:
  static Allocations& instance();

  // The one that holds the pointer; false where there is none.
  bool find(const void* pointer, Allocation& found);
  cudaError_t allocate(void** pointer, size_t bytes, MemoryKind kind);
  // Maps the memory of another process, or counts one more use of it; map() gives its address, or null.
  cudaError_t open_peer(void** pointer, Allocation peer, const std::function<char*()>& map);
  // Unmaps what begins at `pointer` with its last use.
  cudaError_t release(void* pointer, MemoryKind kind);

 private:
  struct State;

  Allocations();

  State& state_;
};

}  // namespace deep_a2a::emulator
