#include "emulator/stack_pool.hpp"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

namespace deep_a2a::emulator {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kStacksAtOnce = 32;  // of one mapping

struct Pool {
  std::mutex mutex;
  std::vector<char*> free;
};

Pool& pool() {
  static Pool& instance = *new Pool;  // never destroyed: stream threads may outlive the statics
  return instance;
}

void add_stacks(std::vector<char*>& free) {
  constexpr size_t kPitch = kStackBytes + kGuardBytes;
  void* memory = mmap(nullptr, kStacksAtOnce * kPitch, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < kStacksAtOnce; ++i) {
    char* guard = static_cast<char*>(memory) + i * kPitch;
    if (mprotect(guard, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    free.push_back(guard + kGuardBytes);
  }
}

}  // namespace

char* take_stack() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  if (pool().free.empty()) add_stacks(pool().free);
  char* stack = pool().free.back();
  pool().free.pop_back();
  return stack;
}

void give_back_stack(char* stack) {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().free.push_back(stack);
}

}  // namespace deep_a2a::emulator
