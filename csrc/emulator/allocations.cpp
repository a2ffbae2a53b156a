#include "emulator/allocations.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>

#include "emulator/memory_file.hpp"

namespace deep_a2a::emulator {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kMostPoisoned = 16 << 20;  // more would cost too much time and memory
constexpr int kPoison = 0xCB;

}  // namespace

struct Allocations::State {
  std::mutex mutex;
  std::map<const char*, Allocation> by_base;
  uint64_t num_created = 0;
};

// Never destroyed: streams may use memory until the process ends.
Allocations::Allocations() : state_(*new State) {}

Allocations& Allocations::instance() {
  static Allocations& instance = *new Allocations;
  return instance;
}

bool Allocations::find(const void* pointer, Allocation& found) {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  auto next = state_.by_base.upper_bound(static_cast<const char*>(pointer));
  if (next == state_.by_base.begin()) return false;
  found = (--next)->second;
  return static_cast<const char*>(pointer) < found.base + found.bytes;
}

cudaError_t Allocations::allocate(void** pointer, size_t bytes, MemoryKind kind) {
  if (pointer == nullptr) return cudaErrorInvalidValue;
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > SIZE_MAX / 2) return cudaErrorMemoryAllocation;
  const std::lock_guard<std::mutex> lock(state_.mutex);
  Allocation made;
  made.kind = kind;
  made.bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  made.pid = getpid();
  made.number = ++state_.num_created;
  if (kind == MemoryKind::kDevice) {
    made.fd = create_memory_file(made.number, made.bytes);
    if (made.fd < 0) return cudaErrorMemoryAllocation;
  }
  made.base = map_memory(made.fd, made.bytes);
  if (made.base == nullptr) {
    if (made.fd >= 0) close(made.fd);
    return cudaErrorMemoryAllocation;
  }
  if (made.bytes <= kMostPoisoned) memset(made.base, kPoison, made.bytes);
  state_.by_base[made.base] = made;
  *pointer = made.base;
  return cudaSuccess;
}

cudaError_t Allocations::open_peer(void** pointer, Allocation peer, const std::function<char*()>& map) {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  for (auto& [base, known] : state_.by_base) {
    if (known.kind != MemoryKind::kPeer || known.pid != peer.pid || known.number != peer.number) continue;
    ++known.uses;
    *pointer = known.base;
    return cudaSuccess;
  }
  peer.kind = MemoryKind::kPeer;
  peer.base = map();
  if (peer.base == nullptr) return cudaErrorInvalidValue;
  state_.by_base[peer.base] = peer;
  *pointer = peer.base;
  return cudaSuccess;
}

cudaError_t Allocations::release(void* pointer, MemoryKind kind) {
  const std::lock_guard<std::mutex> lock(state_.mutex);
  const auto known = state_.by_base.find(static_cast<const char*>(pointer));
  if (known == state_.by_base.end() || known->second.kind != kind) return cudaErrorInvalidValue;
  if (--known->second.uses > 0) return cudaSuccess;
  munmap(known->second.base, known->second.bytes);
  if (known->second.fd >= 0) close(known->second.fd);
  state_.by_base.erase(known);
  return cudaSuccess;
}

}  // namespace deep_a2a::emulator
