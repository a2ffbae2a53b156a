// Checks that say what came and what was expected, and never end the process.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace deep_a2a {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Bad arguments; Python sees a ValueError.
template <class... Parts>
[[noreturn]] void fail_argument(const Parts&... parts) {
  throw std::invalid_argument(text(parts...));
}

template <class... Parts>
void check_argument(bool ok, const Parts&... parts) {
  if (!ok) fail_argument(parts...);
}

}  // namespace deep_a2a
