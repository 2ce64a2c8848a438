// The 8-bit code for eight neighbouring values in a thread.
#pragma once

#include "memory.cuh"

namespace came8bit {

__device__ __forceinline__ bool has_zero_byte(uint32_t x) {
  return ((x - 0x01010101u) & ~x & 0x80808080u) != 0;
}

// Values of eight codes that share `absmax`. A byte that is put into the mantissa of 2^23 is a
// number without a conversion, which would be slow.
__device__ __forceinline__ void decode_vector(const uint2& codes, float absmax, float* m) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t shifted = (half == 0 ? codes.x : codes.y) ^ 0x80808080u;  // code + 128
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float biased = bits_float(__byte_perm(shifted, 0x4b000000u, 0x7540u | i));
      m[4 * half + i] = decode(biased - (0x1p23f + 128.0f), absmax);
    }
    if (has_zero_byte(shifted)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (((shifted >> (8 * i)) & 0xffu) == 0) m[4 * half + i] = bits_float(0x7fc00000u);
      }
    }
  }
}

__device__ __forceinline__ float decode_one(int8_t code, float absmax) {
  return code == kNanCode ? bits_float(0x7fc00000u) : decode(static_cast<float>(code), absmax);
}

// The largest magnitude of eight values as its bit pattern; one that is not finite is larger than
// any that is.
__device__ __forceinline__ uint32_t largest_pattern(const float* m) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t pattern = float_bits(m[i]) & 0x7fffffffu;
    largest = largest < pattern ? pattern : largest;
  }
  return largest;
}
__device__ __forceinline__ uint32_t largest_finite_pattern(const float* m) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t pattern = float_bits(m[i]) & 0x7fffffffu;
    if (pattern < 0x7f800000u && largest < pattern) largest = pattern;
  }
  return largest;
}

// The largest over neighbouring `lanes` threads.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t x, int lanes) {
  for (int half = lanes / 2; half > 0; half /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, x, half);
    x = x < other ? other : x;
  }
  return x;
}

// A code as the low byte of a word; `value` is finite, `scale` is level_scale(absmax).
__device__ __forceinline__ uint32_t encode_one(float value, float scale, float step) {
  const float square = level_square(value, scale);
  const float level = code_level(square, rough_root(square), step);
  // Added to 1.5 * 2^23 a small number stands in the low bits, negative ones in two's complement.
  const float signed_level = bits_float(float_bits(level) | (float_bits(value) & 0x80000000u));
  return float_bits(signed_level + 0x1.8p23f);
}

// Codes of eight values whose block, spread over `lanes` neighbouring threads, they are part of.
// `decays[i]` rounds value i toward zero. All threads of the warp take part. Returns the absmax.
__device__ __forceinline__ float encode_vector(const float* m, const bool* decays, int lanes,
                                               uint2* codes) {
  const uint32_t largest = largest_of_lanes(largest_pattern(m), lanes);
  const bool odd = largest >= 0x7f800000u || (largest != 0 && bits_float(largest) < kTinyAbsmax);
  float absmax = bits_float(largest);
  uint32_t words[kVector];
  if (__all_sync(0xffffffffu, !odd)) {
    const float scale = level_scale(absmax);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      words[i] = encode_one(m[i], scale, decays[i] ? kDecayStep : kNearestStep);
    }
  } else {  // something is not finite, or everything is tiny
    absmax = bits_float(largest_of_lanes(largest_finite_pattern(m), lanes));
    const float factor = absmax < kTinyAbsmax ? kTinyFactor : 1.0f, scale = level_scale(absmax);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      words[i] = is_finite(m[i])
                     ? encode_one(m[i] * factor, scale, decays[i] ? kDecayStep : kNearestStep)
                     : static_cast<uint32_t>(kNanCode);
    }
    if (absmax < kSmallestAbsmax) absmax = 0.0f;
  }
  const auto four = [&](int i) {
    return __byte_perm(__byte_perm(words[i], words[i + 1], 0x0040),
                       __byte_perm(words[i + 2], words[i + 3], 0x0040), 0x5410);
  };
  *codes = make_uint2(four(0), four(4));
  return absmax;
}

}  // namespace came8bit
