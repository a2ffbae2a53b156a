// The cast of BF16 to FP8 with a scale for every 128 channels, by one warp. Formulas and rounding: docs/protocol.md,
// FP8.
#pragma once

#include "cuda/context.cuh"
#include "protocol/args.hpp"

namespace deep_a2a::cuda {

constexpr int kCastChannels = 8;  // of a lane at a time: 16 bytes of BF16
constexpr int kGroupLanes = kScaleGroupChannels / kCastChannels;
constexpr float kMinAmax = 0x1p-96f;

// The smallest power of two that is not below `value` (a positive float, or infinity), as a UE8M0 byte.
__device__ inline uint32_t ceil_ue8m0(float value) {
  const uint32_t bits = __float_as_uint(value);
  return min((bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u), 254u);
}

// 2^-(exponent - 127), exact.
__device__ inline float inverse_of_ue8m0(uint32_t exponent) {
  const uint32_t bits = exponent == 254 ? 1u << 22 : (254 - exponent) << 23;
  return __uint_as_float(bits);
}

struct ScaledGroup {
  float factor;    // what the values are multiplied by
  uint32_t scale;  // the bits to send: FP32, or a UE8M0 byte
};

__device__ inline ScaledGroup scale_group(float amax, float largest, ScaleFormat format) {
  amax = fmaxf(amax, kMinAmax);
  const float scale = __fdiv_rn(amax, largest);
  if (format == ScaleFormat::kFloat32) return {__fdiv_rn(largest, amax), __float_as_uint(scale)};
  const uint32_t exponent = ceil_ue8m0(scale);
  return {inverse_of_ue8m0(exponent), exponent};
}

__device__ inline void write_scale(char* scales, int group, uint32_t scale, ScaleFormat format) {
  if (format == ScaleFormat::kFloat32) {
    reinterpret_cast<uint32_t*>(scales)[group] = scale;
  } else {
    reinterpret_cast<uint8_t*>(scales)[group] = static_cast<uint8_t>(scale);
  }
}

// 8 channels of a lane.
struct CastPiece {
  float values[kCastChannels];
  float amax;

  __device__ void load(const uint4& packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kCastChannels; ++i) {
      values[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
      amax = fmaxf(amax, fabsf(values[i]));  // ignores NaN
    }
  }
  template <bool kIsE4M3>
  __device__ uint2 cast(float factor) const {
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCastChannels; i += 2) {
      const float low = __fmul_rn(values[i], factor), high = __fmul_rn(values[i + 1], factor);
      const uint32_t pair = kIsE4M3 ? ptx::float2_to_e4m3x2(low, high) : ptx::float2_to_e5m2x2(low, high);
      out[i / 4] |= pair << (i % 4 * 8);
    }
    return make_uint2(out[0], out[1]);
  }
};

// Casts `channels` BF16 values, a multiple of 8. The lanes of a group hold its channels, 8 each; several groups are
// under way at once, since one alone waits for its own results most of the time. `from` and `to` may be the same
// memory: the warp has read a piece before it writes it.
template <bool kIsE4M3>
__device__ void cast_row(const char* from, char* to, char* scales, int channels, ScaleFormat format) {
  constexpr int kPieces = 4, kStride = kWarpThreads * kCastChannels;
  const int lane_channel = lane_idx() * kCastChannels;
  for (int first = 0; first < channels; first += kPieces * kStride) {
    CastPiece pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int channel = first + i * kStride + lane_channel;
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (channel < channels) packed = *reinterpret_cast<const uint4*>(from + channel * 2);
      pieces[i].load(packed);
    }
#pragma unroll
    for (int step = kGroupLanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        pieces[i].amax = fmaxf(pieces[i].amax, __shfl_xor_sync(kFullWarp, pieces[i].amax, step));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int channel = first + i * kStride + lane_channel;
      if (channel >= channels) continue;
      const ScaledGroup group = scale_group(pieces[i].amax, kIsE4M3 ? 448.0f : 57344.0f, format);
      *reinterpret_cast<uint2*>(to + channel) = pieces[i].template cast<kIsE4M3>(group.factor);
      if (lane_idx() % kGroupLanes == 0) write_scale(scales, channel / kScaleGroupChannels, group.scale, format);
    }
  }
}

__device__ inline void cast_row(const char* from, char* to, char* scales, int channels, Cast cast, ScaleFormat format) {
  if (cast == Cast::kE4M3) {
    cast_row<true>(from, to, scales, channels, format);
  } else {
    cast_row<false>(from, to, scales, channels, format);
  }
}

__device__ inline void cast_in_place(char* row, char* scales, int channels, Cast cast, ScaleFormat format) {
  cast_row(row, row, scales, channels, cast, format);
}

}  // namespace deep_a2a::cuda
