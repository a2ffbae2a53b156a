// A rank's window in device memory, shared with the processes of its node by CUDA IPC, or a part of somebody else's
// memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace deep_a2a::cuda {

class Window {
 public:
  // The own window, zeroed. std::bad_alloc where the device has not enough memory.
  static std::shared_ptr<Window> create(int64_t bytes, int device);
  // A peer's, by its handle; peer access between the devices is turned on.
  static std::shared_ptr<Window> open(const std::string& handle, int64_t bytes, int device);
  // In memory that `owner` keeps.
  static std::shared_ptr<Window> lend(char* data, int64_t bytes, int device, std::shared_ptr<void> owner);

  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // What another process opens it by.
  std::string handle() const;

 private:
  enum class Origin { kCreated, kOpened, kLent };
  Window(char* data, int64_t bytes, int device, Origin origin)
      : data_(data), bytes_(bytes), device_(device), origin_(origin) {}

  char* data_;
  int64_t bytes_;
  int device_;
  Origin origin_;
  std::shared_ptr<void> owner_;  // of lent memory
};

}  // namespace deep_a2a::cuda
