// The part of the runtime API that is about memory and its IPC handles.
#include <unistd.h>

#include <cstring>

#include "emulator/allocations.hpp"
#include "emulator/memory_file.hpp"
#include "emulator/runtime_error.hpp"
#include "emulator/stream.hpp"

namespace deep_a2a::emulator {
namespace {

constexpr uint64_t kHandleMagic = 0x6564636970633261u;

// What the 64 bytes of a handle are.
struct HandleContent {
  uint64_t magic;
  uint64_t number;
  uint64_t bytes;
  int32_t pid;
  int32_t fd;
};
static_assert(sizeof(HandleContent) <= sizeof(cudaIpcMemHandle_t), "a handle has 64 bytes");

// Like CUDA's, only when no stream uses the memory any more.
cudaError_t free_memory(void* pointer, MemoryKind kind) {
  if (pointer == nullptr) return cudaSuccess;
  synchronize_all();
  return Allocations::instance().release(pointer, kind);
}

cudaError_t open_handle(void** pointer, const cudaIpcMemHandle_t& handle) {
  HandleContent content;
  memcpy(&content, &handle, sizeof content);
  if (pointer == nullptr || content.magic != kHandleMagic) return cudaErrorInvalidValue;
  if (content.pid == getpid()) return cudaErrorDeviceUninitialized;  // as CUDA: handles are for other processes
  Allocation peer;
  peer.bytes = content.bytes;
  peer.pid = content.pid;
  peer.number = content.number;
  return Allocations::instance().open_peer(pointer, peer, [&]() -> char* {
    const int fd = open_memory_file(content.pid, content.fd, content.number, content.bytes);
    if (fd < 0) return nullptr;
    char* memory = map_memory(fd, content.bytes);
    close(fd);
    return memory;
  });
}

}  // namespace
}  // namespace deep_a2a::emulator

using deep_a2a::emulator::Allocation;
using deep_a2a::emulator::Allocations;
using deep_a2a::emulator::MemoryKind;
using deep_a2a::emulator::remember;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return remember(Allocations::instance().allocate(pointer, bytes, MemoryKind::kDevice));
}

cudaError_t cudaFree(void* pointer) { return remember(deep_a2a::emulator::free_memory(pointer, MemoryKind::kDevice)); }

cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, cudaHostAllocDefault); }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return remember(Allocations::instance().allocate(pointer, bytes, MemoryKind::kHost));
}

cudaError_t cudaFreeHost(void* pointer) {
  return remember(deep_a2a::emulator::free_memory(pointer, MemoryKind::kHost));
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  Allocation found;
  const bool is_host = Allocations::instance().find(host, found) && found.kind == MemoryKind::kHost;
  if (device == nullptr || flags != 0 || !is_host) return remember(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

// As CUDA's, the handle of a pointer into an allocation is that of the allocation.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) {
  Allocation found;
  const bool is_device = Allocations::instance().find(pointer, found) && found.kind == MemoryKind::kDevice;
  if (handle == nullptr || !is_device) return remember(cudaErrorInvalidValue);
  const deep_a2a::emulator::HandleContent content{deep_a2a::emulator::kHandleMagic, found.number, found.bytes,
                                                  found.pid, found.fd};
  *handle = {};
  memcpy(handle, &content, sizeof content);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned) {
  return remember(deep_a2a::emulator::open_handle(pointer, handle));
}

cudaError_t cudaIpcCloseMemHandle(void* pointer) {
  deep_a2a::emulator::synchronize_all();
  return remember(Allocations::instance().release(pointer, MemoryKind::kPeer));
}
