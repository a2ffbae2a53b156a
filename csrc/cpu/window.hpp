// A rank's symmetric allocation: anonymous shared memory, reachable only through its file descriptor.
#pragma once

#include <cstdint>
#include <memory>

namespace deep_a2a::cpu {

class Window {
 public:
  // Creates `bytes` of zeroed shared memory; pages take no memory before they are touched.
  static std::shared_ptr<Window> create(int64_t bytes);
  // Maps a peer's window. The descriptor stays the caller's. Throws when it is smaller than `bytes`.
  static std::shared_ptr<Window> map(int fd, int64_t bytes);
  ~Window();

  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1 for a mapped peer, or after close_fd()
  // Peers keep their mappings; nobody can open the window any more.
  void close_fd();

 private:
  Window(int fd, char* data, int64_t bytes) : fd_(fd), data_(data), bytes_(bytes) {}

  int fd_;
  char* data_;
  int64_t bytes_;
};

}  // namespace deep_a2a::cpu
