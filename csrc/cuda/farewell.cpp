#include "cuda/farewell.hpp"

#include <algorithm>
#include <mutex>

#include "cuda/api.hpp"

namespace deep_a2a::cuda {
namespace {

struct Kept {
  std::shared_ptr<Window> window;
  const char* gone;  // the words of the peers
  size_t num_peers;
  int device;
};

std::mutex mutex;
std::vector<Kept>& kept() {
  static auto* windows = new std::vector<Kept>;  // never destroyed: the driver may be gone by then
  return *windows;
}

bool is_unused(const Kept& window) {
  const OnDevice on(window.device);
  std::vector<uint64_t> gone(window.num_peers);
  if (cudaMemcpy(gone.data(), window.gone, gone.size() * sizeof(uint64_t), cudaMemcpyDeviceToHost) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return std::count(gone.begin(), gone.end(), uint64_t{0}) == 0;
}

}  // namespace

void say_farewell(const Shape& shape, int rank, int device, const std::vector<std::shared_ptr<Window>>& windows) {
  const int64_t offset = make_layout(shape).offset(Region::kGone);
  const OnDevice on(device);
  const uint64_t yes = 1;
  for (const auto& window : windows) {
    char* word = window->data() + offset + rank * kWordBytes;
    cudaMemcpy(word, &yes, sizeof(yes), cudaMemcpyHostToDevice);  // where that fails, the peer keeps its window
  }
  const size_t local = static_cast<size_t>(shape.topology.local_of(rank));
  const std::lock_guard<std::mutex> lock(mutex);
  kept().push_back({windows[local], windows[local]->data() + offset, windows.size(), device});
}

void drop_unused_windows() {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& windows = kept();
  windows.erase(std::remove_if(windows.begin(), windows.end(), is_unused), windows.end());
}

}  // namespace deep_a2a::cuda
