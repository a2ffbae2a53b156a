// A cheap random number generator: schedules need many numbers, none of them good.
#pragma once

#include <cstdint>

namespace deep_a2a::emulator {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t mixed = (state_ ^ (state_ >> 32)) * 0xD6E8FEB86659FD93u;
    mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93u;
    return mixed ^ (mixed >> 32);
  }
  // In [0, count).
  uint32_t below(uint32_t count) { return static_cast<uint32_t>(((next() & 0xFFFFFFFFu) * count) >> 32); }
  // Once in `count` times.
  bool once_in(uint32_t count) { return below(count) == 0; }

 private:
  uint64_t state_;
};

}  // namespace deep_a2a::emulator
