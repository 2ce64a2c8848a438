// Storage types of parameters and gradients, and their conversion from and to fp32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CAME8BIT_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define CAME8BIT_INLINE __forceinline
#else
// Never emitted out of line: a copy compiled for one instruction set must not be linked elsewhere.
#define CAME8BIT_INLINE inline __attribute__((always_inline))
#endif

namespace came8bit {

// Hints that the cache line at `p` will be read a little later, into the second-level cache; any
// address is allowed.
CAME8BIT_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  __builtin_prefetch(p, 0, 2);
#else
  static_cast<void>(p);
#endif
}

enum Dtype : int { kFloat32, kBfloat16, kFloat16 };
constexpr int kDtypes = 3;

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// A distance to shift by that is known when compiling.
template <int n>
struct Shift {};

CAME8BIT_INLINE uint32_t float_bits(float x) {
  uint32_t pattern;
  memcpy(&pattern, &x, sizeof pattern);
  return pattern;
}

CAME8BIT_INLINE float bits_float(uint32_t pattern) {
  float x;
  memcpy(&x, &pattern, sizeof x);
  return x;
}

CAME8BIT_INLINE float half_to_float(Half h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Exponents differ by 112; the product is exact and turns subnormals into normals.
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(sign | float_bits(scaled));
#endif
}

// Round to nearest even; overflow gives infinity.
CAME8BIT_INLINE Half float_to_half(float x) {
  const uint32_t pattern = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((pattern >> 16) & 0x8000u);
  const uint32_t magnitude = pattern & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u)};
  }
#if defined(__CUDA_ARCH__)
  uint16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return {rounded};
#else
  if (magnitude >= 0x477ff000u) {  // 65520 and above
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum rounds at 2^-24, the grid of subnormals
    const float shifted = bits_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

}  // namespace came8bit
