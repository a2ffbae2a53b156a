#include "cuda/window.hpp"

#include <cstring>
#include <new>
#include <utility>

#include "cuda/api.hpp"
#include "cuda/farewell.hpp"
#include "protocol/topology.hpp"

namespace deep_a2a::cuda {

std::shared_ptr<Window> Window::create(int64_t bytes, int device) {
  drop_unused_windows();
  const OnDevice on(device);
  void* data = nullptr;
  // Smaller allocations may share a block of memory, and IPC opens whole blocks, each once.
  constexpr int64_t kBlockBytes = 2 << 20;
  const cudaError_t status = cudaMalloc(&data, static_cast<size_t>(align_up(bytes, kBlockBytes)));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  check_cuda(status, "cudaMalloc of a window");
  std::shared_ptr<Window> window(new Window(static_cast<char*>(data), bytes, device, Origin::kCreated));
  check_cuda(cudaMemset(data, 0, static_cast<size_t>(bytes)), "cudaMemset of a window");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return window;
}

std::shared_ptr<Window> Window::open(const std::string& handle, int64_t bytes, int device) {
  cudaIpcMemHandle_t native;
  check_argument(handle.size() == sizeof(native), "a window's handle has ", sizeof(native), " bytes, got ",
                 handle.size());
  std::memcpy(&native, handle.data(), sizeof(native));
  const OnDevice on(device);
  void* data = nullptr;
  check_cuda(cudaIpcOpenMemHandle(&data, native, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle of a window");
  return std::shared_ptr<Window>(new Window(static_cast<char*>(data), bytes, device, Origin::kOpened));
}

std::shared_ptr<Window> Window::lend(char* data, int64_t bytes, int device, std::shared_ptr<void> owner) {
  std::shared_ptr<Window> window(new Window(data, bytes, device, Origin::kLent));
  window->owner_ = std::move(owner);
  return window;
}

Window::~Window() {
  if (origin_ == Origin::kLent) return;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  if (origin_ == Origin::kCreated) {
    cudaFree(data_);
  } else {
    cudaIpcCloseMemHandle(data_);
  }
  cudaSetDevice(before);
}

std::string Window::handle() const {
  cudaIpcMemHandle_t native;
  check_cuda(cudaIpcGetMemHandle(&native, data_), "cudaIpcGetMemHandle of a window");
  return std::string(reinterpret_cast<const char*>(&native), sizeof(native));
}

}  // namespace deep_a2a::cuda
