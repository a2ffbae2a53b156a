#include "emulator/memory_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

namespace deep_a2a::emulator {
namespace {

std::string name_of(uint64_t number) { return "deep_a2a_emulated_" + std::to_string(number); }

}  // namespace

int create_memory_file(uint64_t number, size_t bytes) {
  const int fd = memfd_create(name_of(number).c_str(), MFD_CLOEXEC);
  if (fd < 0) return -1;
  if (ftruncate(fd, static_cast<off_t>(bytes)) == 0) return fd;
  close(fd);
  return -1;
}

// The owner may have closed the descriptor and opened another file with it; its link still says which file it is.
int open_memory_file(int pid, int fd, uint64_t number, size_t bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  char target[128];
  const ssize_t length = readlink(path.c_str(), target, sizeof target);
  if (length < 0 || std::string(target, static_cast<size_t>(length)) != "/memfd:" + name_of(number) + " (deleted)")
    return -1;
  const int opened = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) return -1;
  struct stat status;
  if (fstat(opened, &status) == 0 && static_cast<size_t>(status.st_size) == bytes) return opened;
  close(opened);
  return -1;
}

char* map_memory(int fd, size_t bytes) {
  const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

}  // namespace deep_a2a::emulator
