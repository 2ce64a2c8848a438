// Philox4x32-10 and the rounding to bf16 and fp16: see came8bit/rounding.py for the rules.
//
// F is a float type, I its 32-bit integer type; both may be vectors, whose integer functions come
// with them. Here are those of a single float.
#pragma once

#include "update.h"

namespace came8bit {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

CAME8BIT_INLINE int32_t bits(float x) {
  return static_cast<int32_t>(float_bits(x));
}
CAME8BIT_INLINE float from_bits(int32_t pattern) {
  return bits_float(static_cast<uint32_t>(pattern));
}
CAME8BIT_INLINE float to_float(int32_t x) {
  return static_cast<float>(x);
}
CAME8BIT_INLINE int32_t truncate(float x) {
  return static_cast<int32_t>(x);
}
CAME8BIT_INLINE int32_t select(bool condition, int32_t yes, int32_t no) {
  return condition ? yes : no;
}
CAME8BIT_INLINE bool any(bool condition) {
  return condition;
}
template <int n>
CAME8BIT_INLINE int32_t shift_right(int32_t x, Shift<n>) {
  return static_cast<int32_t>(static_cast<uint32_t>(x) >> n);
}
CAME8BIT_INLINE uint64_t multiply(uint64_t a, uint32_t factor) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // one instruction, which the compiler does not find by itself
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(factor));
  return product;
#else
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * factor;
#endif
}
CAME8BIT_INLINE uint64_t high_half(uint64_t a) {
  return a >> 32;
}
CAME8BIT_INLINE uint64_t exclusive_or(uint64_t a, uint64_t b, uint64_t c) {
  return a ^ b ^ c;
}

// The keys of a round, at first those of the first one.
struct PhiloxKeys {
  uint32_t k0, k1;

  CAME8BIT_INLINE explicit PhiloxKeys(uint64_t seed)
      : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  CAME8BIT_INLINE void next() {
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
};

// One round over the counter, or over what earlier rounds have made of it. W is a 64-bit integer or
// a vector of them; a word is the lower half, and the upper half is rubbish that `multiply`
// ignores.
template <class W>
CAME8BIT_INLINE void philox_round(W& c0, W& c1, W& c2, W& c3, W k0, W k1) {
  const W product0 = multiply(c0, kPhiloxM0), product1 = multiply(c2, kPhiloxM1);
  c0 = exclusive_or(high_half(product1), c1, k0);
  c1 = product1;
  c2 = exclusive_or(high_half(product0), c3, k1);
  c3 = product0;
}

// Replaces the counter by four random words.
template <class W>
CAME8BIT_INLINE void philox(W& c0, W& c1, W& c2, W& c3, uint64_t seed) {
  PhiloxKeys keys(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, keys.next()) {
    philox_round(c0, c1, c2, c3, W(keys.k0), W(keys.k1));
  }
}

// What is added to round to the nearest even bf16.
template <class I>
CAME8BIT_INLINE I to_nearest_bf16(I pattern) {
  return (shift_right(pattern, Shift<16>()) & I(1)) + I(0x7fff);
}
// Whether the magnitude is that of the largest finite bf16, or above, or NaN.
template <class I>
CAME8BIT_INLINE auto beyond_bf16(I pattern) -> decltype(pattern < pattern) {
  return I(0x7f7effff) < (pattern & I(0x7fffffff));
}

// Upper half of the result is the bf16 pattern. `random` holds 16 random bits; `stochastic` false
// rounds to nearest even.
template <class F, class I>
CAME8BIT_INLINE I round_bf16(F value, I random, bool stochastic) {
  const I pattern = bits(value);
  const auto beyond = beyond_bf16(pattern);
  if (stochastic && !any(beyond)) return pattern + random;
  const I to_nearest = to_nearest_bf16(pattern);
  const I raised = pattern + (stochastic ? select(beyond, to_nearest, random) : to_nearest);
  return select(I(0x7f800000) < (pattern & I(0x7fffffff)), I(0x7fc00000), raised);
}

// A value that fp16 holds exactly, or one that a cast rounds to nearest (overflow, NaN).
template <class F, class I>
CAME8BIT_INLINE F round_fp16(F value, I random) {
  const I pattern = bits(value);
  const F magnitude = abs(value);
  const F normal = from_bits((pattern + shift_right(random, Shift<3>())) & I(~0x1fff));
  const auto is_tiny = magnitude < F(0x1p-14f);
  const I fixed = truncate(select(is_tiny, magnitude, F(0.0f)) * F(0x1p40f)) + random;
  const F tiny = to_float(shift_right(fixed, Shift<16>())) * F(0x1p-24f);
  const F subnormal = from_bits(bits(tiny) | (pattern & I(static_cast<int32_t>(0x80000000u))));
  return select(magnitude < F(65504.0f), select(is_tiny, subnormal, normal), value);
}

}  // namespace came8bit
