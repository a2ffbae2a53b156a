// Casts whose rounding the protocol fixes to the bit: nearest even, one NaN, saturating FP8. See docs/protocol.md.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.hpp"

namespace deep_a2a {

DEEP_A2A_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DEEP_A2A_HOST_DEVICE inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

DEEP_A2A_HOST_DEVICE inline float bf16_to_float(uint16_t value) { return bits_float(uint32_t{value} << 16); }

// Branch-free, so that loops over rows vectorise.
DEEP_A2A_HOST_DEVICE inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded);
}

struct E4M3 {
  static constexpr int kMantissaBits = 3;
  static constexpr int kMinExponent = -6;  // of normal numbers
  static constexpr uint32_t kMaxCode = 0x7E;
  static constexpr float kMax = 448.0f;
};

struct E5M2 {
  static constexpr int kMantissaBits = 2;
  static constexpr int kMinExponent = -14;
  static constexpr uint32_t kMaxCode = 0x7B;
  static constexpr float kMax = 57344.0f;
};

// Nearest even, saturating; NaN becomes 0x7F. Branch-free like the above.
template <class Format>
DEEP_A2A_HOST_DEVICE inline uint8_t float_to_fp8(float value) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + Format::kMinExponent) << 23;
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: round the mantissa in place, then rebias the exponent.
  const uint32_t rounded = magnitude + ((1u << (kShift - 1)) - 1u) + ((magnitude >> kShift) & 1u);
  const uint32_t normal = (rounded >> kShift) - ((kMinNormal >> 23) - 1u) * (1u << Format::kMantissaBits);
  // Subnormal results: adding this constant leaves the code in the low mantissa bits, rounded by the FP32 addition.
  constexpr uint32_t kDenormalBits = static_cast<uint32_t>(127 + Format::kMinExponent + kShift) << 23;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + bits_float(kDenormalBits)) - kDenormalBits;
  uint32_t code = magnitude < kMinNormal ? subnormal : normal;
  code = code > Format::kMaxCode || magnitude >= 0x7F800000u ? Format::kMaxCode : code;
  code |= (bits >> 24) & 0x80u;
  return static_cast<uint8_t>(magnitude > 0x7F800000u ? 0x7Fu : code);
}

}  // namespace deep_a2a
