#include "emulator/control.hpp"

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "emulator/random.hpp"

namespace deep_a2a::emulator {
namespace {

double number_from_environment(const char* name, double otherwise) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return otherwise;
  char* end = nullptr;
  const double number = std::strtod(value, &end);
  if (*end == '\0' && number >= 0) return number;
  std::fprintf(stderr, "deep_a2a emulator: %s is \"%s\", expected a number of at least 0; using %g\n", name, value,
               otherwise);
  return otherwise;
}

struct Settings {
  std::mutex mutex;
  uint64_t seed = static_cast<uint64_t>(number_from_environment("DEEP_A2A_EMULATOR_SEED", 0));
  uint64_t num_launches = 0;
  double idle_limit_s = number_from_environment("DEEP_A2A_EMULATOR_IDLE_LIMIT_S", 600);
  std::string message;
};

// Never destroyed: streams may outlive the statics of this file.
Settings& settings() {
  static Settings& instance = *new Settings;
  return instance;
}

}  // namespace

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().seed = seed;
  settings().num_launches = 0;
}

uint64_t seed_of_next_launch() {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  Random mix(settings().seed);
  return mix.next() + settings().num_launches++ * 0xA24BAED4963EE407u;
}

void set_idle_limit(double seconds) {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().idle_limit_s = seconds;
}

double idle_limit() {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  return settings().idle_limit_s;
}

std::string last_message() {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  return settings().message;
}

void report_failure(const std::string& message) {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().message = message;
  std::fprintf(stderr, "deep_a2a emulator: %s\n", message.c_str());
}

}  // namespace deep_a2a::emulator
