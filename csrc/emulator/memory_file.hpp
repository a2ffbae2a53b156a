// Memory without a name in the file system, which other processes reach through the owner's file descriptor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_a2a::emulator {

// A file descriptor, or -1.
int create_memory_file(uint64_t number, size_t bytes);
// Of another process; -1 where it has gone, or `fd` is no longer the file of this number and size.
int open_memory_file(int pid, int fd, uint64_t number, size_t bytes);
// Shared memory of the file, or private memory for -1; null where there is none.
char* map_memory(int fd, size_t bytes);

}  // namespace deep_a2a::emulator
