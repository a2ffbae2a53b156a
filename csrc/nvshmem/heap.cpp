#include "nvshmem/heap.hpp"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <new>
#include <utility>

#include "cuda/api.hpp"
#include "cuda/stream.hpp"
#include "nvshmem/job.hpp"
#include "protocol/topology.hpp"

namespace deep_a2a::network {
namespace {

std::vector<int> sorted(std::vector<int> pes) {
  std::sort(pes.begin(), pes.end());
  return pes;
}

}  // namespace

// Keeps the range of a window taken.
struct Lease {
  uint64_t number;

  explicit Lease(uint64_t the_number) : number(the_number) {}
  ~Lease() { SymmetricHeap::instance().give_back(number); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
};

// Never destroyed: windows may be left when the process ends.
SymmetricHeap& SymmetricHeap::instance() {
  static SymmetricHeap& instance = *new SymmetricHeap;
  return instance;
}

void SymmetricHeap::grow(int64_t bytes, int device) {
  check_argument(bytes > 0 && bytes % kAlignment == 0, "a block has whole ", kAlignment, " bytes, got ", bytes);
  size_t number = 0;
  {
    // Counted though it fails: where it fails on some ranks alone, blocks must have the same numbers ever after.
    const std::lock_guard<std::mutex> lock(mutex_);
    number = blocks_.size();
    blocks_.push_back({nullptr, {}});
  }
  char* data = allocate_symmetric(bytes, device);
  if (data == nullptr) throw std::bad_alloc();
  const std::lock_guard<std::mutex> lock(mutex_);
  blocks_[number] = {data, {{0, bytes, Use::kFree, {}, 0}}};
}

std::vector<Range> SymmetricHeap::free_ranges(const std::vector<int>& pes, int most) const {
  const std::vector<int> members = sorted(pes);
  std::vector<Range> ranges;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t block = 0; block < blocks_.size(); ++block) {
    for (const Part& part : blocks_[block].parts) {
      const bool is_known = std::includes(members.begin(), members.end(), part.writers.begin(), part.writers.end());
      if (part.use == Use::kFree && is_known) ranges.push_back({static_cast<int>(block), part.offset, part.bytes});
    }
  }
  std::stable_sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.bytes > b.bytes; });
  if (ranges.size() > static_cast<size_t>(most)) ranges.resize(static_cast<size_t>(most));
  return ranges;
}

std::shared_ptr<cuda::Window> SymmetricHeap::take(const Range& range, const std::vector<int>& pes, int device) {
  check_argument(range.offset % kAlignment == 0 && range.bytes > 0, "a range has whole multiples of ", kAlignment,
                 " bytes before it, got ", range.offset);
  char* data = nullptr;
  uint64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_argument(range.block >= 0 && static_cast<size_t>(range.block) < blocks_.size(), "there is no block ",
                   range.block);
    Block& block = blocks_[static_cast<size_t>(range.block)];
    const int64_t end = range.offset + align_up(range.bytes, kAlignment);
    const auto part = std::find_if(block.parts.begin(), block.parts.end(), [&](const Part& p) {
      return p.use == Use::kFree && p.offset <= range.offset && end <= p.offset + p.bytes;
    });
    check_argument(part != block.parts.end(), "bytes ", range.offset, " to ", end, " of block ", range.block,
                   " are not free");
    const Part whole = *part;
    number = ++num_windows_;
    *part = {range.offset, end - range.offset, Use::kTaken, sorted(pes), number};
    auto next = part;
    if (whole.offset < range.offset) {
      next = block.parts.insert(part, {whole.offset, range.offset - whole.offset, Use::kFree, whole.writers, 0}) + 1;
    }
    if (end < whole.offset + whole.bytes) {
      block.parts.insert(next + 1, {end, whole.offset + whole.bytes - end, Use::kFree, whole.writers, 0});
    }
    data = block.data + range.offset;
  }
  auto lease = std::make_shared<Lease>(number);  // gives the range back if the rest fails
  const cuda::OnDevice on(device);
  cuda::check_cuda(cudaMemset(data, 0, static_cast<size_t>(range.bytes)), "cudaMemset of a window");
  cuda::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return cuda::Window::lend(data, range.bytes, device, std::move(lease));
}

std::shared_ptr<cuda::Window> SymmetricHeap::reach(const cuda::Window& window, int pe, int device) const {
  char* mapped = mapped_at_pe(window.data(), pe);
  if (mapped == nullptr) return nullptr;
  const cuda::OnDevice on(device);
  for (const int64_t at : {int64_t{0}, window.bytes() - 1}) {  // a copy is refused where a kernel would break
    char byte = 0;
    if (cudaMemcpy(&byte, mapped + at, 1, cudaMemcpyDeviceToHost) == cudaSuccess) continue;
    cudaGetLastError();
    throw CommError(text("NVSHMEM says that the memory of PE ", pe, " is mapped here, but byte ", at, " of ",
                         window.bytes(),
                         " cannot be read: set NVSHMEM_DISABLE_CUDA_VMM=1, and NVSHMEM_SYMMETRIC_SIZE "
                         "to what all Buffers take"));
  }
  return cuda::Window::lend(mapped, window.bytes(), device, nullptr);
}

// Free neighbours become one part, with the writers of both.
void SymmetricHeap::merge_free(std::vector<Part>& parts) {
  std::vector<Part> merged;
  for (Part& part : parts) {
    if (merged.empty() || part.use != Use::kFree || merged.back().use != Use::kFree) {
      merged.push_back(std::move(part));
      continue;
    }
    std::vector<int> writers;
    std::set_union(merged.back().writers.begin(), merged.back().writers.end(), part.writers.begin(), part.writers.end(),
                   std::back_inserter(writers));
    merged.back().bytes += part.bytes;
    merged.back().writers = std::move(writers);
  }
  parts = std::move(merged);
}

bool SymmetricHeap::settle(double timeout_s, int device) {
  std::vector<uint64_t> given_back;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    visit_parts([&](const Block&, const Part& part) {
      if (part.use == Use::kGivenBack) given_back.push_back(part.number);
    });
  }
  if (given_back.empty()) return true;
  // Of their own, and left alone where the puts never end: to destroy them would be to wait.
  auto* stream = new cuda::Stream(device);
  auto* event = new cuda::Event(device);
  quiet(stream->get());
  event->record(stream->get());
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
  while (!event->done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    sched_yield();
  }
  delete event;
  delete stream;
  const std::lock_guard<std::mutex> lock(mutex_);
  visit_parts([&](const Block&, Part& part) {
    if (part.use == Use::kGivenBack && std::count(given_back.begin(), given_back.end(), part.number) > 0) {
      part.use = Use::kFree;
    }
  });
  for (Block& block : blocks_) merge_free(block.parts);
  return true;
}

void SymmetricHeap::lose(const cuda::Window& window) {
  const std::lock_guard<std::mutex> lock(mutex_);
  visit_parts([&](const Block& block, Part& part) {
    if (block.data + part.offset == window.data() && part.use != Use::kFree) part.use = Use::kLost;
  });
}

void SymmetricHeap::give_back(uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  visit_parts([&](const Block&, Part& part) {
    if (part.number == number && part.use == Use::kTaken) part.use = Use::kGivenBack;
  });
}

int64_t SymmetricHeap::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const Block& block : blocks_) {
    for (const Part& part : block.parts) bytes += part.bytes;
  }
  return bytes;
}

void SymmetricHeap::forget_all() {
  const std::lock_guard<std::mutex> lock(mutex_);
  visit_parts([](const Block&, const Part& part) {
    check_argument(part.use != Use::kTaken,
                   "the NVSHMEM job still has windows: drop Buffers and views of their memory");
  });
  blocks_.clear();
}

}  // namespace deep_a2a::network
