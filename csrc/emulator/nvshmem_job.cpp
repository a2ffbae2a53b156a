#include "emulator/nvshmem_job.hpp"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"

namespace deep_a2a::emulator {
namespace {

constexpr int kMaxPes = 256;
constexpr unsigned kPollUs = 50;

uint64_t node_name() {
  const char* name = std::getenv("NVSHMEM_FAKE_HOST");
  return std::hash<std::string>()(name == nullptr ? "" : name);
}

}  // namespace

// In memory that all processes of the job have mapped.
struct NvshmemJob::Board {
  struct Entry {
    uint64_t steps;  // meetings that this PE has come to
    uint64_t node;
    uint64_t bytes;
    cudaIpcMemHandle_t memory;
  };
  Entry entries[kMaxPes];
};

// Never destroyed: kernels may put until the process ends.
NvshmemJob& NvshmemJob::instance() {
  static NvshmemJob& instance = *new NvshmemJob;
  return instance;
}

bool NvshmemJob::create(cudaIpcMemHandle_t& name) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, sizeof(Board)) != cudaSuccess) return false;
  memset(memory, 0, sizeof(Board));
  const std::lock_guard<std::mutex> lock(mutex_);
  board_ = nullptr;
  blocks_.assign(1, {static_cast<char*>(memory), sizeof(Board), {}});  // joined to by this process without its handle
  return cudaIpcGetMemHandle(&name, memory) == cudaSuccess;
}

bool NvshmemJob::join(const cudaIpcMemHandle_t& name, int pe, int num_pes) {
  if (is_joined() || num_pes < 1 || num_pes > kMaxPes || pe < 0 || pe >= num_pes) return false;
  const bool is_creator = !blocks_.empty();
  void* memory = is_creator ? blocks_.front().own : nullptr;
  if (!is_creator && cudaIpcOpenMemHandle(&memory, name, 0) != cudaSuccess) return false;
  blocks_.clear();
  board_ = static_cast<Board*>(memory);
  pe_ = pe;
  num_pes_ = num_pes;
  steps_ = 0;
  board_->entries[pe].node = node_name();
  if (meet()) return true;
  board_ = nullptr;
  return false;
}

void NvshmemJob::leave() {
  drain();
  meet();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Block& block : blocks_) {
    for (int peer = 0; peer < num_pes_; ++peer) {
      if (peer != pe_) cudaIpcCloseMemHandle(block.of_pe[static_cast<size_t>(peer)]);
    }
    cudaFree(block.own);
  }
  blocks_.clear();
  board_ = nullptr;  // stays mapped: a peer may still be looking at it
}

bool NvshmemJob::meet() {
  ++steps_;
  __atomic_store_n(&board_->entries[pe_].steps, steps_, __ATOMIC_RELEASE);
  const uint64_t start = clock_ns();
  for (int peer = 0; peer < num_pes_; ++peer) {
    while (__atomic_load_n(&board_->entries[peer].steps, __ATOMIC_ACQUIRE) < steps_) {
      if (static_cast<double>(clock_ns() - start) > idle_limit() * 1e9) {
        report_failure(text("NVSHMEM: PE ", peer, " has not come to a collective call of PE ", pe_));
        return false;
      }
      usleep(kPollUs);
    }
  }
  return true;
}

void* NvshmemJob::allocate(size_t bytes) {
  Block block{nullptr, bytes, std::vector<char*>(static_cast<size_t>(num_pes_))};
  auto& mine = board_->entries[pe_];
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes) == cudaSuccess) block.own = static_cast<char*>(memory);
  mine.bytes = block.own == nullptr ? 0 : bytes;
  if (block.own != nullptr) cudaIpcGetMemHandle(&mine.memory, block.own);
  if (!meet()) return nullptr;
  bool complete = bytes > 0;
  for (int peer = 0; peer < num_pes_; ++peer) {
    void* opened = block.own;
    const auto& theirs = board_->entries[peer];
    complete = complete && theirs.bytes == bytes &&
               (peer == pe_ || cudaIpcOpenMemHandle(&opened, theirs.memory, 0) == cudaSuccess);
    block.of_pe[static_cast<size_t>(peer)] = static_cast<char*>(opened);
  }
  if (!meet()) return nullptr;  // entries may be written again
  if (!complete) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  blocks_.push_back(block);
  return block.own;
}

char* NvshmemJob::at(const void* own, int pe) {
  const auto* address = static_cast<const char*>(own);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pe < 0 || pe >= num_pes_) throw KernelError(text("NVSHMEM: PE ", pe, " of ", num_pes_));
  for (const Block& block : blocks_) {
    if (address < block.own || address >= block.own + block.bytes) continue;
    return block.of_pe[static_cast<size_t>(pe)] + (address - block.own);
  }
  throw KernelError(text("NVSHMEM: ", own, " is not in symmetric memory"));
}

bool NvshmemJob::is_on_node(int pe) const { return board_->entries[pe].node == board_->entries[pe_].node; }

void NvshmemJob::put(char* to, const char* from, size_t bytes, uint64_t* word, uint64_t value, int pe) {
  // The waiter polls: nobody sleeps on this one.
  static cpu::Doorbell unused{};
  const cpu::Put put{bytes > 0 ? at(to, pe) : nullptr,          from,  static_cast<int64_t>(bytes),
                     reinterpret_cast<uint64_t*>(at(word, pe)), value, &unused};
  if (bytes > 0) at(from, pe_);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (network_ != nullptr) {
    network_->submit(put);
  } else {
    cpu::deliver(put);
  }
}

void NvshmemJob::drain() {
  const std::lock_guard<std::mutex> lock(mutex_);
  network_.reset();
  if (seed_) network_ = std::make_unique<cpu::DisturbedNetwork>(++*seed_ * 1000003);
}

void NvshmemJob::set_seed(std::optional<uint64_t> seed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  network_.reset();
  seed_ = seed;
  if (seed_) network_ = std::make_unique<cpu::DisturbedNetwork>(*seed_);
}

void set_network_seed(std::optional<uint64_t> seed) { NvshmemJob::instance().set_seed(seed); }

}  // namespace deep_a2a::emulator
