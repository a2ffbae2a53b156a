#include "cpu/copy.hpp"

#include <algorithm>
#include <cstring>

// ThreadSanitizer does not see streaming stores, so under it every copy is a memcpy.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define DEEP_A2A_STREAMING 1
#include <immintrin.h>
#endif

namespace deep_a2a::cpu {

#ifdef DEEP_A2A_STREAMING
namespace {

constexpr int64_t kLine = 64;

__attribute__((target("avx512f"))) void copy_lines(char* to, const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  }
}

}  // namespace

void copy_streaming(void* to, const void* from, int64_t bytes) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  const int64_t head = std::min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine));
  const int64_t lines = has_avx512 ? (bytes - head) / kLine * kLine : 0;
  std::memcpy(target, source, static_cast<size_t>(lines > 0 ? head : bytes));
  if (lines == 0) return;
  copy_lines(target + head, source + head, lines);
  std::memcpy(target + head + lines, source + head + lines, static_cast<size_t>(bytes - head - lines));
}

void streaming_fence() { _mm_sfence(); }
#else
void copy_streaming(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

void streaming_fence() {}
#endif

}  // namespace deep_a2a::cpu
