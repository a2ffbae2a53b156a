// What tests can set and ask.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deep_a2a::emulator {

// A kernel did what hardware forbids, or cannot go on; it leaves the launch and becomes its stream's error.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Schedules of later launches follow from it and from how many launches came before since it was set. Until it is
// called, the environment variable DEEP_A2A_EMULATOR_SEED, else 0.
void set_seed(uint64_t seed);
uint64_t seed_of_next_launch();

// A launch fails where for this long nothing but polling has happened. Until it is called, the environment variable
// DEEP_A2A_EMULATOR_IDLE_LIMIT_S, else 600.
void set_idle_limit(double seconds);
double idle_limit();

// Of the kernel that failed last in this process, or empty.
std::string last_message();
void report_failure(const std::string& message);

}  // namespace deep_a2a::emulator
