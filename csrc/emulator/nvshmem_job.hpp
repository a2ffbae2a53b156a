// The processes that share symmetric memory, and how bytes get from one to another.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/network.hpp"
#include "cuda_runtime_api.h"

namespace deep_a2a::emulator {

class NvshmemJob {
 public:
  static NvshmemJob& instance();

  // Of a job to come; whoever joins opens the memory of this process.
  bool create(cudaIpcMemHandle_t& name);
  // With all others: true once they have come.
  bool join(const cudaIpcMemHandle_t& name, int pe, int num_pes);
  void leave();
  bool is_joined() const { return board_ != nullptr; }
  int pe() const { return pe_; }
  int num_pes() const { return num_pes_; }

  // With all others, who ask for as much; null where they do not, or there is no memory.
  void* allocate(size_t bytes);
  // The same place in the memory of `pe`, as mapped here. Throws KernelError for memory that is not symmetric.
  char* at(const void* own, int pe);
  bool is_on_node(int pe) const;

  // Both addresses of this PE. The word is set after the bytes have been written.
  void put(char* to, const char* from, size_t bytes, uint64_t* word, uint64_t value, int pe);
  // Until all puts so far have been delivered.
  void drain();
  void set_seed(std::optional<uint64_t> seed);

 private:
  struct Board;
  struct Block {
    char* own;
    size_t bytes;
    std::vector<char*> of_pe;
  };

  bool meet();

  mutable std::mutex mutex_;
  Board* board_ = nullptr;
  int pe_ = 0;
  int num_pes_ = 0;
  uint64_t steps_ = 0;  // meetings of the job so far
  std::vector<Block> blocks_;
  std::optional<uint64_t> seed_;
  std::unique_ptr<cpu::DisturbedNetwork> network_;
};

// Puts from now on come late, as drawn from the seed; at once without one.
void set_network_seed(std::optional<uint64_t> seed);

}  // namespace deep_a2a::emulator
