// The cast of BF16 to FP8 with a scale for every 128 channels, by one warp. Formulas and rounding: docs/protocol.md,
// FP8.
#pragma once

#include "cuda/context.cuh"
#include "protocol/args.hpp"

namespace deep_a2a::cuda {

constexpr int kCastChannels = 8;  // of a piece: 16 bytes of BF16
constexpr int kGroupLanes = 4;    // that hold a group together
constexpr int kLanePieces = kScaleGroupChannels / kCastChannels / kGroupLanes;
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

// The larger magnitude in each half, of BF16 values; NaN is ignored.
__device__ inline uint32_t larger_magnitude(uint32_t most, uint32_t pair) {
  return ptx::max_bf16x2(most, pair & 0x7FFF7FFFu);
}

__device__ inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

template <bool kIsE4M3>
__device__ inline uint32_t cast_pair(uint32_t pair, float factor) {
  const float low = __fmul_rn(low_bf16(pair), factor), high = __fmul_rn(high_bf16(pair), factor);
  return kIsE4M3 ? ptx::float2_to_e4m3x2(low, high) : ptx::float2_to_e5m2x2(low, high);
}

template <bool kIsE4M3>
__device__ inline uint2 cast_piece(const uint4& packed, float factor) {
  return make_uint2(cast_pair<kIsE4M3>(packed.x, factor) | cast_pair<kIsE4M3>(packed.y, factor) << 16,
                    cast_pair<kIsE4M3>(packed.z, factor) | cast_pair<kIsE4M3>(packed.w, factor) << 16);
}

// Whether a row's next groups are on their way while some are cast: it hides the way from global memory, but takes
// registers.
enum class CastLoads : int { kInTurn, kAhead };

// Casts `channels` BF16 values, a multiple of 8. Four lanes have a group, so that its divisions are done four times and
// not once for every few channels; each takes its pieces in an order that keeps the lanes on different banks of shared
// memory. `from` and `to` may be the same memory: the warp has read its groups before it writes them.
template <CastLoads kLoads, bool kIsE4M3>
__device__ void cast_row(const char* from, char* to, char* scales, int channels, ScaleFormat format) {
  constexpr int kStep = kWarpThreads / kGroupLanes * kScaleGroupChannels;
  const int group_idx = lane_idx() / kGroupLanes, lane_of_group = lane_idx() % kGroupLanes;
  int group_channel = group_idx * kScaleGroupChannels;
  const auto channel_of = [&](int i) {
    const int piece = (i + group_idx) % kLanePieces * kGroupLanes + lane_of_group;
    return group_channel + piece * kCastChannels;
  };
  const auto load = [&](uint4(&pieces)[kLanePieces], int ahead) {
#pragma unroll
    for (int i = 0; i < kLanePieces; ++i) {
      pieces[i] = make_uint4(0, 0, 0, 0);
      const int channel = channel_of(i) + ahead;
      if (channel < channels) pieces[i] = *reinterpret_cast<const uint4*>(from + channel * 2);
    }
  };
  uint4 next[kLanePieces];
  if constexpr (kLoads == CastLoads::kAhead) load(next, 0);
  for (int first = 0; first < channels; first += kStep) {
    uint4 pieces[kLanePieces];
    if constexpr (kLoads == CastLoads::kAhead) {
#pragma unroll
      for (int i = 0; i < kLanePieces; ++i) pieces[i] = next[i];
      load(next, kStep);
    } else {
      load(pieces, 0);
    }
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kLanePieces; ++i) {
      most = larger_magnitude(larger_magnitude(most, pieces[i].x), pieces[i].y);
      most = larger_magnitude(larger_magnitude(most, pieces[i].z), pieces[i].w);
    }
    float amax = fmaxf(low_bf16(most), high_bf16(most));
#pragma unroll
    for (int step = kGroupLanes / 2; step > 0; step /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
    }
    const ScaledGroup scaled = scale_group(amax, kIsE4M3 ? 448.0f : 57344.0f, format);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLanePieces; ++i) {
      if (channel_of(i) >= channels) continue;
      *reinterpret_cast<uint2*>(to + channel_of(i)) = cast_piece<kIsE4M3>(pieces[i], scaled.factor);
    }
    if (lane_of_group == 0 && group_channel < channels) {
      write_scale(scales, group_channel / kScaleGroupChannels, scaled.scale, format);
    }
    group_channel += kStep;
  }
}

template <CastLoads kLoads>
__device__ inline void cast_row(const char* from, char* to, char* scales, int channels, Cast cast, ScaleFormat format) {
  if (cast == Cast::kE4M3) {
    cast_row<kLoads, true>(from, to, scales, channels, format);
  } else {
    cast_row<kLoads, false>(from, to, scales, channels, format);
  }
}

// Of a row in shared memory.
__device__ inline void cast_in_place(char* row, char* scales, int channels, Cast cast, ScaleFormat format) {
  cast_row<CastLoads::kInTurn>(row, row, scales, channels, cast, format);
}

}  // namespace deep_a2a::cuda
