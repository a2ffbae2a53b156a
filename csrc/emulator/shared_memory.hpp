// The dynamic shared memory of a block, poisoned, with a margin that shows stores outside it. Behind the margin nothing
// is mapped: who reads or writes there ends the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_a2a::emulator {

constexpr size_t kSharedAlignment = 128;

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* pointer, size_t bytes) const;
  uint32_t offset_of(const void* pointer) const;
  bool is_intact() const;

 private:
  size_t bytes_;
  size_t mapped_bytes_;  // the guard included
  char* mapped_;
  char* data_;
};

}  // namespace deep_a2a::emulator
