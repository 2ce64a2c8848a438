// The 8-bit code of the momentum: see came8bit/reference/quant.py, which states its laws.
#pragma once

#include "update.h"

namespace came8bit {

// Of numbers that are not NaN.
CAME8BIT_INLINE float larger(float x, float y) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(x, y);
#else
  return x > y ? x : y;  // the library's is a call
#endif
}

constexpr int kBlockSize = 256;
constexpr int kNanCode = -128;
// 1 - bias: what must be added to a level to reach the point from which the next one is taken.
constexpr float kNearestStep = 0.5f;
constexpr float kDecayStep = 1.0f - 0x1p-14f;
constexpr float kSmallestAbsmax = 0x1p-126f;
constexpr float kInverse127 = 1.0f / 127.0f;
constexpr float kLargestSquare = 127.0f * 127.0f;

// Value of a code, given as a number of type T; not for kNanCode.
template <class T>
CAME8BIT_INLINE T decode(T code, T absmax) {
  const T t = code * T(kInverse127);
  return (t * abs(t)) * absmax;
}

// Coarse codes, of 4 and 2 bits: several in a byte, the first in its lowest bits; bf16 scales. With
// 0 bits there are neither. See came8bit/reference/rungs.py.
constexpr int kCoarseBlock = 128;
CAME8BIT_INLINE constexpr int scales_of_block(int bits) {
  return bits == 2 ? 2 : bits == 0 ? 0 : 1;
}
CAME8BIT_INLINE constexpr int64_t bytes_of_slice(int64_t slice_len, int bits) {
  return (slice_len * bits + 7) / 8;
}

// The byte that holds the first 8/bits codes of `wide`, which are the lowest bits of bytes.
template <int bits>
CAME8BIT_INLINE uint8_t packed_byte(const int8_t* wide) {
  int byte = 0;
  for (int i = 0; i < 8 / bits; ++i) byte |= (wide[i] & ((1 << bits) - 1)) << i * bits;
  return static_cast<uint8_t>(byte);
}

// 4 bits: levels up to 7, as two's complement.
constexpr int kNanCode4 = -8;
constexpr float kInverse7 = 1.0f / 7.0f;
constexpr float kLargestSquare4 = 7.0f * 7.0f;
constexpr uint32_t kLargestBf16 = 0x7f7f0000u;

// The same code by look-up: level q begins at the square (q - 1/2)^2, so where 4*square, cut to a
// whole number, reaches (2q - 1)^2. That is one more than a multiple of 8, so each of the few
// values of (4*square + 7) / 8 has one level.
constexpr int kLastOf4 = (4 * 49 + 7) / 8;
constexpr int8_t kLevels4[kLastOf4 + 1] = {0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5,
                                           5, 5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7};

template <class T>
CAME8BIT_INLINE T decode4(T code, T scale) {
  const T t = code * T(kInverse7);
  return (t * abs(t)) * scale;
}

// 2 bits: bit 0 is set above the mean of the block, bit 1 is the sign. The scales are the levels
// below and above the mean.
struct Levels {
  float low, high;
};
constexpr float kSmallestLevel = 0x1p-100f;

// The bits of the nearest bf16 that is finite; for a finite x >= 0.
CAME8BIT_INLINE uint16_t scale_bits(float x) {
  const uint32_t pattern = float_bits(x);
  if (pattern > kLargestBf16) return static_cast<uint16_t>(kLargestBf16 >> 16);
  return static_cast<uint16_t>((pattern + 0x7fffu + ((pattern >> 16) & 1u)) >> 16);
}
CAME8BIT_INLINE float scale_of(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}

CAME8BIT_INLINE float nearest_scale(float x) {
  return scale_of(scale_bits(x));
}

// The power of two that magnitudes of a 2-bit block are rounded to, and 1 over it.
struct Unit {
  float unit, inverse;
};
CAME8BIT_INLINE Unit unit_of_block(float largest) {
  const uint32_t exponent = float_bits(nearest_scale(largest)) >> 23;
  const uint32_t of_unit = (exponent < 17 ? 17 : exponent) - 16;
  return {bits_float(of_unit << 23), bits_float((254 - of_unit) << 23)};
}
// A magnitude in units, at most 2^17: rounded to even by the spacing of fp32 above 2^23.
template <class T>
CAME8BIT_INLINE T nearest_whole(T x) {
  return (x + T(0x1p23f)) - T(0x1p23f);
}
// Whether one of `count` magnitudes in units is above their mean; exact, as are its sides. T is
// float, a vector of it, or uint32_t.
template <class T>
CAME8BIT_INLINE auto above_mean(T units, T count, T total) -> decltype(units > total) {
  return units * count > total;
}
// Sums of a block in units, all exact: of all `count` values and of those above the mean.
CAME8BIT_INLINE Levels levels_of_block(float total, float count, float above_sum, float above_count,
                                       bool has_zero, float unit) {
  const float below = (total - above_sum) / larger(count - above_count, 1.0f);
  const float low = has_zero ? 0.0f : nearest_scale(nearest_whole(below) * unit);
  const float high = nearest_scale((above_sum / larger(above_count, 1.0f)) * unit);
  if (larger(high, low) < kSmallestLevel) return {0.0f, 0.0f};
  return {low, larger(high, low)};
}

// Blocks below this are scaled by a power of two first: 127^2/absmax would overflow.
constexpr float kTinyAbsmax = 0x1p-100f;
constexpr float kTinyFactor = 0x1p64f;

// 127^2/absmax, of blocks that are neither tiny nor infinite.
template <class T>
CAME8BIT_INLINE T usual_level_scale(T absmax, T largest_square) {
  return largest_square / absmax;
}
// The same of a tiny block after scaling, and 0 for a block that stores zeros.
CAME8BIT_INLINE float level_scale(float absmax, float largest_square = kLargestSquare) {
  if (absmax < kSmallestAbsmax) return 0.0f;
  return usual_level_scale(absmax < kTinyAbsmax ? absmax * kTinyFactor : absmax, largest_square);
}
// The same of a block that is not tiny; of one of zeros any number will do.
CAME8BIT_INLINE float level_scale_of_usual(float absmax, float largest_square) {
  return usual_level_scale(larger(absmax, kTinyAbsmax), largest_square);
}

// Square of the level that x would have on a continuous scale; the code is the largest whole level
// q with (q - bias)^2 <= square.
template <class T>
CAME8BIT_INLINE T level_square(T x, T scale) {
  return abs(x) * scale;
}

// The magnitude of the code from any `root` within 0.05 of sqrt(square): the guess, cut to a whole
// number, errs at most by one, downwards, and a comparison makes it exact; to nearest, the root
// itself will do as well. NaN for NaN.
template <class T>
CAME8BIT_INLINE T code_guess(T root, T step) {
  return root + (T(0.9375f) - step);
}
// The square from which on the level is one more than `guess`.
template <class T>
CAME8BIT_INLINE T square_of_next(T guess, T step) {
  const T next = guess + step;
  return next * next;
}
template <class T>
CAME8BIT_INLINE T code_level(T square, T root, T step) {
  const T guess = whole(code_guess(root, step));
  return increment_unless(square_of_next(guess, step) > square, guess);
}

}  // namespace came8bit
