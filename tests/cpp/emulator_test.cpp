// Tests of the emulator: kernels of their own, against scalar references, under many schedules.
#include <cstdio>

#include "emulator/harness.hpp"

int main() {
  using namespace deep_a2a::emulator_test;
  struct {
    const char* name;
    void (*run)();
  } const tests[] = {{"processes", test_processes}, {"warps", test_warps},     {"blocks", test_blocks},
                     {"copies", test_copies},       {"races", test_races},     {"failures", test_failures},
                     {"functions", test_functions}, {"runtime", test_runtime}, {"network", test_network}};
  for (const auto& test : tests) {
    const int before = num_failures;
    test.run();
    std::printf("%-10s %s\n", test.name, num_failures == before ? "passed" : "FAILED");
    std::fflush(stdout);
  }
  return num_failures == 0 ? 0 : 1;
}
