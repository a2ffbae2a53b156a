#include "cpu/row_math.hpp"

#include <algorithm>
#include <cstring>

#include "protocol/numerics.hpp"

namespace deep_a2a::cpu {
namespace {

#define DEEP_A2A_INLINE inline __attribute__((always_inline))

constexpr int kBlock = 256;  // floats summed at a time: stays in the first-level cache
constexpr float kMinAmax = 0x1p-96f;

DEEP_A2A_INLINE void load(const uint16_t* row, int n, float* sum) {
  for (int i = 0; i < n; ++i) sum[i] = bf16_to_float(row[i]);
}

DEEP_A2A_INLINE void add(const uint16_t* row, int n, float* sum) {
  for (int i = 0; i < n; ++i) sum[i] += bf16_to_float(row[i]);
}

DEEP_A2A_INLINE void round(const float* sum, int n, uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16(sum[i]);
}

// Sums terms [begin, end) at `start` into `sum`; the first initialises it where `fresh`.
DEEP_A2A_INLINE void accumulate(const RowTerms& terms, int begin, int end, int start, int n, bool fresh, float* sum) {
  for (int term = begin; term < end; ++term) {
    if (fresh && term == begin) {
      load(terms.rows[term] + start, n, sum);
    } else {
      add(terms.rows[term] + start, n, sum);
    }
  }
}

DEEP_A2A_INLINE void add_rows_body(const RowTerms& terms, uint16_t* out, int hidden) {
  float sum[kBlock], own[kBlock];
  for (int start = 0; start < hidden; start += kBlock) {
    const int n = std::min(kBlock, hidden - start);
    accumulate(terms, 0, terms.own_begin, start, n, true, sum);
    if (terms.own_begin == 0) {
      accumulate(terms, 0, terms.own_end, start, n, true, sum);
    } else if (terms.own_begin < terms.own_end) {
      accumulate(terms, terms.own_begin, terms.own_end, start, n, true, own);
      for (int i = 0; i < n; ++i) sum[i] += own[i];
    }
    accumulate(terms, terms.own_end, terms.count, start, n, terms.own_end == 0, sum);
    round(sum, n, out + start);
  }
}

DEEP_A2A_INLINE void weigh_rows_body(const uint16_t* const* rows, const float* weights, int count, uint16_t* out,
                                     int hidden) {
  float sum[kBlock];
  for (int start = 0; start < hidden; start += kBlock) {
    const int n = std::min(kBlock, hidden - start);
    for (int term = 0; term < count; ++term) {
      const uint16_t* row = rows[term] + start;
      const float weight = weights[term];
      if (term == 0) {
        for (int i = 0; i < n; ++i) sum[i] = weight * bf16_to_float(row[i]);
      } else {
        for (int i = 0; i < n; ++i) sum[i] = __builtin_fmaf(weight, bf16_to_float(row[i]), sum[i]);
      }
    }
    round(sum, n, out + start);
  }
}

// The smallest power of two that is not below `value` (a positive float, or infinity), as a UE8M0 byte.
DEEP_A2A_INLINE uint8_t ceil_ue8m0(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<uint8_t>(std::min<uint32_t>((bits >> 23) + ((bits & 0x7FFFFFu) != 0), 254));
}

// 2^-(exponent - 127), exact; the last one, which only an infinity reaches, is subnormal.
DEEP_A2A_INLINE float power_of_two_inverse(uint8_t exponent) {
  return bits_float(exponent == 254 ? 1u << 22 : static_cast<uint32_t>(254 - exponent) << 23);
}

template <class Format>
DEEP_A2A_INLINE void cast_row_body(const uint16_t* row, int hidden, ScaleFormat scale_format, uint8_t* payload,
                                   void* scales) {
  for (int group = 0, start = 0; start < hidden; ++group, start += kScaleGroupChannels) {
    const int n = std::min(kScaleGroupChannels, hidden - start);
    uint32_t amax_bits = float_bits(kMinAmax);  // magnitudes compare as integers
    for (int i = 0; i < n; ++i) {
      const uint32_t magnitude = (uint32_t{row[start + i]} << 16) & 0x7FFFFFFFu;
      amax_bits = std::max(amax_bits, magnitude > 0x7F800000u ? 0u : magnitude);
    }
    const float amax = bits_float(amax_bits);
    float inverse = Format::kMax / amax;
    if (scale_format == ScaleFormat::kFloat32) {
      static_cast<float*>(scales)[group] = amax / Format::kMax;
    } else {
      const uint8_t exponent = ceil_ue8m0(amax / Format::kMax);
      static_cast<uint8_t*>(scales)[group] = exponent;
      inverse = power_of_two_inverse(exponent);
    }
    for (int i = 0; i < n; ++i) payload[start + i] = float_to_fp8<Format>(bf16_to_float(row[start + i]) * inverse);
  }
}

// One set of the three, compiled for one instruction set. A variant only widens the loops: no contraction, no
// reassociation (the build forbids both), so all give the same bits.
struct RowMath {
  void (*add)(const RowTerms&, uint16_t*, int);
  void (*weigh)(const uint16_t* const*, const float*, int, uint16_t*, int);
  void (*cast_e4m3)(const uint16_t*, int, ScaleFormat, uint8_t*, void*);
  void (*cast_e5m2)(const uint16_t*, int, ScaleFormat, uint8_t*, void*);
};

#define DEEP_A2A_ROW_MATH(name, attributes)                                                                            \
  struct name {                                                                                                        \
    attributes static void add(const RowTerms& terms, uint16_t* out, int hidden) {                                     \
      add_rows_body(terms, out, hidden);                                                                               \
    }                                                                                                                  \
    attributes static void weigh(const uint16_t* const* rows, const float* weights, int count, uint16_t* out,          \
                                 int hidden) {                                                                         \
      weigh_rows_body(rows, weights, count, out, hidden);                                                              \
    }                                                                                                                  \
    attributes static void cast_e4m3(const uint16_t* row, int hidden, ScaleFormat format, uint8_t* payload, void* s) { \
      cast_row_body<E4M3>(row, hidden, format, payload, s);                                                            \
    }                                                                                                                  \
    attributes static void cast_e5m2(const uint16_t* row, int hidden, ScaleFormat format, uint8_t* payload, void* s) { \
      cast_row_body<E5M2>(row, hidden, format, payload, s);                                                            \
    }                                                                                                                  \
    static constexpr RowMath table() { return {add, weigh, cast_e4m3, cast_e5m2}; }                                    \
  };

DEEP_A2A_ROW_MATH(Portable, )
#if defined(__x86_64__)
DEEP_A2A_ROW_MATH(Avx2, __attribute__((target("avx2,fma"))))
DEEP_A2A_ROW_MATH(Avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

RowMath choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Avx512::table();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2::table();
#endif
  return Portable::table();
}

const RowMath& row_math() {
  static const RowMath table = choose();
  return table;
}

}  // namespace

void add_rows(const RowTerms& terms, uint16_t* out, int hidden) {
  if (terms.count == 0) {
    std::memset(out, 0, static_cast<size_t>(hidden) * 2);
  } else {
    row_math().add(terms, out, hidden);
  }
}

void weigh_rows(const uint16_t* const* rows, const float* weights, int count, uint16_t* out, int hidden) {
  if (weights == nullptr) {
    add_rows({rows, count, 0, count}, out, hidden);
  } else {
    row_math().weigh(rows, weights, count, out, hidden);
  }
}

void cast_row(const uint16_t* row, int hidden, Cast cast, ScaleFormat scale_format, uint8_t* payload, void* scales) {
  const auto cast_one = cast == Cast::kE5M2 ? row_math().cast_e5m2 : row_math().cast_e4m3;
  cast_one(row, hidden, scale_format, payload, scales);
}

}  // namespace deep_a2a::cpu
