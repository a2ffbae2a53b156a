// The dynamic shared memory of a block, poisoned, with a margin that shows stores outside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace deep_a2a::emulator {

constexpr size_t kSharedAlignment = 128;

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* pointer, size_t bytes) const;
  uint32_t offset_of(const void* pointer) const;
  bool is_intact() const;

 private:
  size_t bytes_;
  std::unique_ptr<char[]> memory_;
  char* data_;
};

}  // namespace deep_a2a::emulator
