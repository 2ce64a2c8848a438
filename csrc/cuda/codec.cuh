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

// The largest magnitude below infinity.
__device__ __forceinline__ float largest_finite(const float* m) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (is_finite(m[i])) largest = larger_magnitude(largest, m[i]);
  }
  return largest;
}

// The largest over neighbouring `lanes` threads; NaN if there is one.
__device__ __forceinline__ float largest_of_lanes(float x, int lanes) {
  if (lanes == kWarp) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return bits_float(__reduce_max_sync(0xffffffffu, float_bits(x)));  // patterns sort like values
#else
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) {
      x = larger_magnitude(x, __shfl_xor_sync(0xffffffffu, x, half));
    }
    return x;
#endif
  }
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) {
    x = larger_magnitude(x, __shfl_xor_sync(0xffffffffu, x, half));
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

// The same rounded to nearest: code_level with kNearestStep, the guess left where it stands in the
// mantissa of 2^23 (which truncates it), and one subtraction to the point where the next one
// begins.
__device__ __forceinline__ uint32_t encode_nearest(float value, float scale) {
  const float square = level_square(value, scale);
  const float guess = __fadd_rz(rough_root(square) + 0.4375f, 0x1p23f);
  const float next = guess - (0x1p23f - kNearestStep);
  const float level = next * next > square ? next - kNearestStep : next + kNearestStep;
  const float signed_level = bits_float(float_bits(level) | (float_bits(value) & 0x80000000u));
  return float_bits(signed_level + 0x1.8p23f);
}

// Codes of eight values whose block, spread over `lanes` neighbouring threads, they are part of.
// Where `decaying[i]` is zero value i is rounded toward zero. All threads of the warp take part,
// also those whose values are not `there` but zeros. Returns the absmax.
__device__ __forceinline__ float encode_vector(const float* m, const float* decaying, bool there,
                                               int lanes, uint2* codes) {
  float absmax = largest_of_lanes(largest_magnitude(m), lanes);
  const bool usual = absmax == 0.0f || (absmax >= kTinyAbsmax && is_finite(absmax));
  bool decays = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) decays = decays || decaying[i] == 0.0f;
  uint32_t words[kVector];
  if (__all_sync(0xffffffffu, usual && !(decays && there))) {
    const float scale = level_scale(absmax);
#pragma unroll
    for (int i = 0; i < kVector; ++i) words[i] = encode_nearest(m[i], scale);
  } else {  // something decays, is not finite, or everything is tiny
    absmax = largest_of_lanes(largest_finite(m), lanes);
    const float factor = absmax < kTinyAbsmax ? kTinyFactor : 1.0f, scale = level_scale(absmax);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float step = decaying[i] == 0.0f ? kDecayStep : kNearestStep;
      words[i] = is_finite(m[i]) ? encode_one(m[i] * factor, scale, step)
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
