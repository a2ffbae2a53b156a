#include "emulator/shared_memory.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace deep_a2a::emulator {
namespace {

constexpr unsigned char kPoison = 0xD7;
constexpr size_t kMarginBytes = 1024;
constexpr size_t kGuardBytes = 4096;

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes) {
  const size_t used = round_up(bytes, kSharedAlignment) + kMarginBytes,
               whole = round_up(kMarginBytes + used, kGuardBytes);
  mapped_bytes_ = whole + kGuardBytes;
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<char*>(memory);
  if (mprotect(mapped_ + whole, kGuardBytes, PROT_NONE) != 0) {
    munmap(mapped_, mapped_bytes_);
    throw std::bad_alloc();
  }
  memset(mapped_, kPoison, whole);
  data_ = mapped_ + (whole - used);
}

SharedMemory::~SharedMemory() { munmap(mapped_, mapped_bytes_); }

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
