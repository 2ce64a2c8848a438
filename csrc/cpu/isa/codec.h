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

// --- 4 bits -----------------------------------------------------------------------------------

// `codes` as numbers, NaN where they are kNanCode4.
CAME8BIT_INLINE void decode4_codes(const int8_t* codes, float scale, int size, float* x) {
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const I code = load_some(codes + j, some);
    const F value = decode4(to_float(code), F(scale));
    store_some(x + j, select(code == I(kNanCode4), F(NAN), value), some);
  });
}

void decode4(const uint8_t* codes, bool odd, float scale, int size, float* x) {
  alignas(64) int8_t wide[kBlockSize4 + 2];
  const int bytes = (size + odd + 1) / 2;
  for (int i = 0; i < bytes; ++i) {
    const int both = codes[i];
    wide[2 * i] = static_cast<int8_t>(((both & 15) ^ 8) - 8);
    wide[2 * i + 1] = static_cast<int8_t>(((both >> 4) ^ 8) - 8);
  }
  decode4_codes(wide + odd, scale, size, x);
}

uint16_t encode4(float* x, float largest, int size, uint8_t* codes) {
  alignas(64) int8_t wide[kBlockSize4 + 2];
  const bool odd = largest < kTinyAbsmax || largest == INFINITY;
  if (largest == INFINITY) largest = largest_finite(x, size);
  odd ? encode_block<false, true>(x, nullptr, largest, kLargestSquare4, size, wide)
      : encode_block<false, false>(x, nullptr, largest, kLargestSquare4, size, wide);
  for (int i = 0; i < size; ++i) {
    if (wide[i] == kNanCode) wide[i] = kNanCode4;
  }
  const uint16_t scale = scale_bits(largest < kSmallestAbsmax ? 0.0f : largest);
  decode4_codes(wide, scale_of(scale), size, x);
  if (size % 2 != 0) wide[size] = 0;
  for (int i = 0; i < (size + 1) / 2; ++i) {
    codes[i] = static_cast<uint8_t>((wide[2 * i] & 15) | (wide[2 * i + 1] & 15) << 4);
  }
  return scale;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
