// The codes of the momentum.
#pragma once

#include "vectors.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

constexpr int kLine = 64;  // elements of 8-bit momentum in a cache line

CAME8BIT_INLINE F decode_lanes(I code, F absmax) {
  const F value = decode(to_float(code), absmax);
  return select(code == I(kNanCode), F(NAN), value);
}

// Calls lanes(j, size) for all of [0, size), full vectors first.
template <class LanesOf>
CAME8BIT_INLINE void for_lanes(int size, LanesOf lanes) {
  int j = 0;
  for (; j + kLanes <= size; j += kLanes) lanes(j, kLanes);
  if (j < size) lanes(j, size - j);
}

float largest_magnitude(const float* x, int size) {
  F largest(0.0f);
  for_lanes(size, [&](int j, int some)
                      CAME8BIT_LAMBDA { largest = larger(abs(load_some(x + j, some)), largest); });
  return largest_lane(largest);
}

// The largest magnitude below infinity, for the rare block that has an infinity.
float largest_finite(const float* x, int size) {
  F largest(0.0f);
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const F magnitude = abs(load_some(x + j, some));
    largest = larger(select(magnitude < F(INFINITY), magnitude, F(0.0f)), largest);
  });
  return largest_lane(largest);
}

// The codes of one vector, and the sign of its values.
CAME8BIT_INLINE I encode_lanes(F value, F scale, F step) {
  const F square = level_square(value, scale);
  const F level = code_level(square, rough_root(square), step);
  // The truncation of NaN is the smallest integer, which the store saturates to kNanCode.
  const I sign = bits(value) & I(static_cast<int32_t>(0x80000000u));
  return truncate(from_bits(bits(level) | sign));
}

// `some_steps` says that `step` is there; `odd` that x has an infinity or is tiny.
template <bool some_steps, bool odd>
CAME8BIT_INLINE void encode_block(const float* x, const float* step, float absmax,
                                  float largest_square, int size, int8_t* codes) {
  const F scale(level_scale(absmax, largest_square));
  const F factor(absmax < kTinyAbsmax ? kTinyFactor : 1.0f);
  const auto lanes = [&](int j, int some) CAME8BIT_LAMBDA {
    F value = load_some(x + j, some);
    if (odd) value = select(abs(value) < F(INFINITY), value, F(NAN)) * factor;
    const F to_next = some_steps ? load_some(step + j, some) : F(kNearestStep);
    return encode_lanes(value, scale, to_next);
  };
  constexpr int k = kLanes;
  int j = 0;
  for (; j + 4 * k <= size; j += 4 * k) {
    store_codes(codes + j, lanes(j, k), lanes(j + k, k), lanes(j + 2 * k, k), lanes(j + 3 * k, k));
  }
  for (; j < size; j += k) store_some(codes + j, lanes(j, size - j), size - j);
}

float encode(const float* x, const float* step, float largest, int size, int8_t* codes) {
  const bool odd = largest < kTinyAbsmax || largest == INFINITY;
  if (largest == INFINITY) largest = largest_finite(x, size);
  if (odd) {
    step ? encode_block<true, true>(x, step, largest, kLargestSquare, size, codes)
         : encode_block<false, true>(x, step, largest, kLargestSquare, size, codes);
  } else {
    step ? encode_block<true, false>(x, step, largest, kLargestSquare, size, codes)
         : encode_block<false, false>(x, step, largest, kLargestSquare, size, codes);
  }
  return largest < kSmallestAbsmax ? 0.0f : largest;
}

void decode(const int8_t* codes, float absmax, int size, float* x) {
  const F scale(absmax);
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    store_some(x + j, decode_lanes(load_some(codes + j, some), scale), some);
  });
}

// --- coarse codes -----------------------------------------------------------------------------

// Codes of `bits` bits as bytes, padded to whole bytes of packed ones.
typedef int8_t WideCodes[kCoarseBlock + 8];

template <int bits>
CAME8BIT_INLINE void unpack(const uint8_t* codes, int size, WideCodes& wide) {
  constexpr int kSign = bits == 4 ? 8 : 0;  // two's complement
  for (int i = 0; i * 8 < size * bits; ++i) {
    for (int j = 0; j < 8 / bits; ++j) {
      const int code = codes[i] >> j * bits & ((1 << bits) - 1);
      wide[i * (8 / bits) + j] = static_cast<int8_t>((code ^ kSign) - kSign);
    }
  }
}

template <int bits>
CAME8BIT_INLINE void pack(WideCodes& wide, int size, uint8_t* codes) {
  memset(wide + size, 0, 8);
  for (int i = 0; i * 8 < size * bits; ++i) {
    int packed = 0;
    for (int j = 0; j < 8 / bits; ++j) {
      packed |= (wide[i * (8 / bits) + j] & ((1 << bits) - 1)) << j * bits;
    }
    codes[i] = static_cast<uint8_t>(packed);
  }
}

// `codes` as numbers, NaN where they are kNanCode4.
CAME8BIT_INLINE void decode4_wide(const int8_t* codes, float scale, int size, float* x) {
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const I code = load_some(codes + j, some);
    const F value = decode4(to_float(code), F(scale));
    store_some(x + j, select(code == I(kNanCode4), F(NAN), value), some);
  });
}

void decode4(const uint8_t* codes, int skip, const uint16_t* scale, float factor, int size,
             float* x) {
  alignas(64) WideCodes wide;
  unpack<4>(codes, size + skip, wide);
  decode4_wide(wide + skip, scale_of(*scale) * factor, size, x);
}

void encode4(float* x, float largest, int size, uint8_t* codes, uint16_t* scale) {
  alignas(64) WideCodes wide;
  const bool odd = largest < kTinyAbsmax || largest == INFINITY;
  if (largest == INFINITY) largest = largest_finite(x, size);
  odd ? encode_block<false, true>(x, nullptr, largest, kLargestSquare4, size, wide)
      : encode_block<false, false>(x, nullptr, largest, kLargestSquare4, size, wide);
  for (int i = 0; i < size; ++i) {
    if (wide[i] == kNanCode) wide[i] = kNanCode4;
  }
  *scale = scale_bits(largest < kSmallestAbsmax ? 0.0f : largest);
  decode4_wide(wide, scale_of(*scale), size, x);
  pack<4>(wide, size, codes);
}

void decode2(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
             float* x) {
  alignas(64) WideCodes wide;
  unpack<2>(codes, size + skip, wide);
  const F low(scale_of(scales[0]) * factor), high(scale_of(scales[1]) * factor);
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const I code = load_some(wide + skip + j, some);
    const I sign = select((code & I(2)) == I(2), I(INT32_MIN), I(0));
    const F level = select((code & I(1)) == I(1), high, low);
    store_some(x + j, from_bits(bits(level) ^ sign), some);
  });
}

void encode2(float* x, float largest, int size, uint8_t* codes, uint16_t* scales) {
  if (largest == INFINITY) largest = largest_finite(x, size);
  const Unit unit = unit_of_block(largest);
  const F sizes(static_cast<float>(size)), zero(0.0f);
  // Lanes past the end hold 0.
  alignas(64) float whole[kCoarseBlock];
  F sum(zero), above_sum(zero);
  int not_zero = 0, above_count = 0;
  for (int j = 0; j < size; j += kLanes) {
    const F value = abs(load_some(x + j, size - j));
    const F magnitude = select(value < F(INFINITY), value, zero);
    not_zero += count(magnitude > zero);
    const F units = nearest_whole(magnitude * F(unit.inverse));
    store(whole + j, units);
    sum = sum + units;
  }
  const float total = sum_lanes(sum);
  for (int j = 0; j < size; j += kLanes) {
    const F units = load(whole + j);
    const M above = units * sizes > F(total);
    above_count += count(above);
    above_sum = above_sum + select(above, units, zero);
  }
  const Levels levels =
      levels_of_block(total, static_cast<float>(size), sum_lanes(above_sum),
                      static_cast<float>(above_count), not_zero < size, unit.unit);
  scales[0] = scale_bits(levels.low);
  scales[1] = scale_bits(levels.high);

  alignas(64) WideCodes wide;
  const F low(levels.low), high(levels.high);
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const M above = (load(whole + j) * sizes > F(total)) & (high > low);
    const F level = select(above, high, low);
    const M negative = (load_some(x + j, some) < zero) & (level > zero);
    const I sign = select(negative, I(INT32_MIN), I(0));
    store_some(wide + j, select(above, I(1), I(0)) | select(negative, I(2), I(0)), some);
    store_some(x + j, from_bits(bits(level) | sign), some);
  });
  pack<2>(wide, size, codes);
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
