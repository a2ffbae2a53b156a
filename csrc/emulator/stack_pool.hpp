// Stacks of fibers, kept from one launch to the next.
#pragma once

#include <cstddef>

namespace deep_a2a::emulator {

constexpr size_t kStackBytes = 64 << 10;

// The lowest address of kStackBytes, below which lies a page that nobody may touch. Throws std::bad_alloc.
char* take_stack();
void give_back_stack(char* stack);

}  // namespace deep_a2a::emulator
