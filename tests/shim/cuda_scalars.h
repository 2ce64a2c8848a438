// Scalar and vector types and intrinsics of CUDA C++, for a C++ compiler.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace came8bit_shim {

template <class T>
uint64_t to_word(T value) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "warp operations take 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace came8bit_shim

// Aligned as on a GPU: the sanitizer stops at an access that a GPU would refuse.
#define CAME8BIT_VECTOR(Name, T)                      \
  struct alignas(2 * sizeof(T)) Name##2 {             \
    T x, y;                                           \
  };                                                  \
  struct alignas(4 * sizeof(T)) Name##4 {             \
    T x, y, z, w;                                     \
  };                                                  \
  inline Name##2 make_##Name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline Name##4 make_##Name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
CAME8BIT_VECTOR(uint, unsigned)
CAME8BIT_VECTOR(int, int)
CAME8BIT_VECTOR(float, float)
CAME8BIT_VECTOR(ushort, unsigned short)
CAME8BIT_VECTOR(short, short)
CAME8BIT_VECTOR(uchar, unsigned char)
CAME8BIT_VECTOR(char, signed char)
#undef CAME8BIT_VECTOR

inline unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(came8bit_shim::to_word(x));
}
inline int __float_as_int(float x) {
  return static_cast<int>(__float_as_uint(x));
}
inline float __uint_as_float(unsigned x) {
  return came8bit_shim::from_word<float>(x);
}
inline float __int_as_float(int x) {
  return __uint_as_float(static_cast<unsigned>(x));
}

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return sqrtf(a);
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dsub_rn(double a, double b) {
  return a - b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline double __dsqrt_rn(double a) {
  return sqrt(a);
}

// Toward zero: the rounded sum, one step back where it lies beyond the exact one.
inline float __fadd_rz(float a, float b) {
  const float sum = a + b;
  if (!std::isfinite(sum)) {
    return std::isfinite(a) && std::isfinite(b) ? copysignf(FLT_MAX, sum) : sum;
  }
  const float part = sum - a, error = (a - (sum - part)) + (b - part);
  return (error < 0.0f && sum > 0.0f) || (error > 0.0f && sum < 0.0f) ? nextafterf(sum, 0.0f) : sum;
}

inline int __float2int_rn(float x) {
  return static_cast<int>(nearbyintf(x));
}
inline int __float2int_rz(float x) {
  return static_cast<int>(x);
}
inline unsigned __float2uint_rz(float x) {
  return static_cast<unsigned>(x);
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __ll2float_rn(long long x) {
  return static_cast<float>(x);
}
inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = (selector >> (4 * i)) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (shift & 31u)) >>
                               32);
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
