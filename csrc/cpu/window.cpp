#include "cpu/window.hpp"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "common/check.hpp"

namespace deep_a2a::cpu {
namespace {

[[noreturn]] void fail_system(const char* call, int64_t bytes) {
  throw std::runtime_error(text(call, " failed for a window of ", bytes, " bytes: ", std::strerror(errno)));
}

char* map_shared(int fd, int64_t bytes) {
  void* data = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (data == MAP_FAILED) fail_system("mmap", bytes);
  ::madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint; not every kernel has it for shared memory
  return static_cast<char*>(data);
}

}  // namespace

std::shared_ptr<Window> Window::create(int64_t bytes) {
  const int fd = ::memfd_create("deep_a2a", MFD_CLOEXEC);
  if (fd < 0) fail_system("memfd_create", bytes);
  try {
    if (::ftruncate(fd, bytes) != 0) fail_system("ftruncate", bytes);
    return std::shared_ptr<Window>(new Window(fd, map_shared(fd, bytes), bytes));
  } catch (...) {
    ::close(fd);
    throw;
  }
}

std::shared_ptr<Window> Window::map(int fd, int64_t bytes) {
  struct stat info = {};
  if (::fstat(fd, &info) != 0) fail_system("fstat", bytes);
  if (info.st_size < bytes) {
    throw std::runtime_error(text("a peer's window has ", info.st_size, " bytes, expected at least ", bytes));
  }
  return std::shared_ptr<Window>(new Window(-1, map_shared(fd, bytes), bytes));
}

Window::~Window() {
  ::munmap(data_, static_cast<size_t>(bytes_));
  close_fd();
}

void Window::close_fd() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

}  // namespace deep_a2a::cpu
