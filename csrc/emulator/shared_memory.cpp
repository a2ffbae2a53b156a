#include "emulator/shared_memory.hpp"

#include <cstring>

namespace deep_a2a::emulator {
namespace {

constexpr unsigned char kPoison = 0xD7;
constexpr size_t kMarginBytes = 1024;

}  // namespace

SharedMemory::SharedMemory(size_t bytes)
    : bytes_(bytes), memory_(new char[bytes + 2 * kMarginBytes + kSharedAlignment]) {
  memset(memory_.get(), kPoison, bytes + 2 * kMarginBytes + kSharedAlignment);
  const auto first = reinterpret_cast<uintptr_t>(memory_.get()) + kMarginBytes;
  data_ = reinterpret_cast<char*>((first + kSharedAlignment - 1) & ~uintptr_t{kSharedAlignment - 1});
}

bool SharedMemory::contains(const void* pointer, size_t bytes) const {
  const auto* begin = static_cast<const char*>(pointer);
  return begin >= data_ && begin <= data_ + bytes_ && bytes <= static_cast<size_t>(data_ + bytes_ - begin);
}

uint32_t SharedMemory::offset_of(const void* pointer) const {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - data_);
}

bool SharedMemory::is_intact() const {
  for (size_t i = 1; i <= kMarginBytes; ++i) {
    if (static_cast<unsigned char>(data_[-static_cast<ptrdiff_t>(i)]) != kPoison) return false;
    if (static_cast<unsigned char>(data_[bytes_ + i - 1]) != kPoison) return false;
  }
  return true;
}

}  // namespace deep_a2a::emulator
