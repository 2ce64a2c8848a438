// Coarse codes of the momentum, of 4, 2 and 0 bits.
#pragma once

#include "codec.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Codes of `bits` bits as bytes, with room for what fills the last packed byte.
typedef int8_t WideCodes[kCoarseBlock + 8];

template <int bits>
CAME8BIT_INLINE void pack(WideCodes& wide, int size, uint8_t* codes) {
  int j = 0;
  for (; j + 64 <= size; j += 64) pack_64<bits>(wide + j, codes + j * bits / 8);
  if (j == size) return;
  memset(wide + size, 0, 8);
  for (; j < size; j += 8 / bits) codes[j * bits / 8] = packed_byte<bits>(wide + j);
}

// What each of the sixteen patterns of four bits stands for; of two bits, each four times.
CAME8BIT_INLINE F levels4(float scale) {
  alignas(64) const float number[16] = {0, 1, 2, 3, 4, 5, 6, 7, NAN, -7, -6, -5, -4, -3, -2, -1};
  static_assert(kNanCode4 + 16 == 8, "the place of NaN");
  return came8bit::decode4(load(number), F(scale));
}
CAME8BIT_INLINE F levels2(float low, float high) {
  alignas(64) const float is_high[16] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
  alignas(64) const float sign[16] = {0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f,
                                      0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f};
  const F level = select(load(is_high) > F(0.0f), F(high), F(low));
  return from_bits(bits(level) ^ bits(load(sign)));
}

template <int bits>
CAME8BIT_INLINE void decode_packed(const uint8_t* codes, int skip, F levels, int size, float* x) {
  int j = 0;
  for (; skip == 0 && j + kLanes <= size; j += kLanes) {
    store(x + j, look_up(levels, load_packed<bits>(codes + j * bits / 8)));
  }
  if (j == size) return;
  alignas(64) float value[kLanes];
  store(value, levels);
  for (; j < size; ++j) {
    const int at = (j + skip) * bits;
    x[j] = value[codes[at / 8] >> at % 8 & ((1 << bits) - 1)];
  }
}

void decode4(const uint8_t* codes, int skip, const uint16_t* scale, float factor, int size,
             float* x) {
  decode_packed<4>(codes, skip, levels4(scale_of(*scale) * factor), size, x);
}

void encode4(const float* x, float largest, int size, uint8_t* codes, uint16_t* scale,
             float* held) {
  alignas(64) WideCodes wide;
  const bool odd = largest < kTinyAbsmax || largest == INFINITY;
  if (largest == INFINITY) largest = largest_finite(x, size);
  odd ? encode_block<false, true>(x, nullptr, largest, kLargestSquare4, size, wide)
      : encode_block<false, false>(x, nullptr, largest, kLargestSquare4, size, wide);
  for (int i = 0; i < size; ++i) wide[i] = wide[i] < kNanCode4 ? kNanCode4 : wide[i];
  *scale = scale_bits(largest < kSmallestAbsmax ? 0.0f : largest);
  const F levels = levels4(scale_of(*scale));
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    store_some(held + j, look_up(levels, load_some(wide + j, some)), some);
  });
  pack<4>(wide, size, codes);
}

void decode2(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
             float* x) {
  const F levels = levels2(scale_of(scales[0]) * factor, scale_of(scales[1]) * factor);
  decode_packed<2>(codes, skip, levels, size, x);
}

void encode2(const float* x, float largest, int size, uint8_t* codes, uint16_t* scales,
             float* held) {
  if (largest == INFINITY) largest = largest_finite(x, size);
  const Unit unit = unit_of_block(largest);
  const F sizes(static_cast<float>(size)), zero(0.0f);
  // Lanes past the end hold 0.
  alignas(64) float whole[kCoarseBlock];
  F sum(zero), above_sum(zero), above_count(zero);
  M none = zero < zero;
  bool has_zero = false;
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const F value = abs(load_some(x + j, some));
    const F magnitude = select(value < F(INFINITY), value, zero);
    const M is_zero = magnitude == zero;
    if (some == kLanes) {
      none = none | is_zero;
    } else {
      has_zero = count(is_zero) > kLanes - some;
    }
    const F units = nearest_whole(magnitude * F(unit.inverse));
    store(whole + j, units);
    sum = sum + units;
  });
  const float total = sum_lanes(sum);
  for (int j = 0; j < size; j += kLanes) {
    const F units = load(whole + j);
    const M above = units * sizes > F(total);
    above_count = above_count + select(above, F(1.0f), zero);
    above_sum = above_sum + select(above, units, zero);
  }
  const Levels levels = levels_of_block(total, static_cast<float>(size), sum_lanes(above_sum),
                                        sum_lanes(above_count), has_zero || any(none), unit.unit);
  scales[0] = scale_bits(levels.low);
  scales[1] = scale_bits(levels.high);

  alignas(64) WideCodes wide;
  const F low(levels.low), high(levels.high);
  const F mean(levels.high > levels.low ? total : INFINITY);  // times the number of values
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    const M above = load(whole + j) * sizes > mean;
    const F level = select(above, high, low);
    const M negative = (load_some(x + j, some) < zero) & (level > zero);
    const I sign = select(negative, I(INT32_MIN), I(0));
    store_some(wide + j, select(above, I(1), I(0)) | select(negative, I(2), I(0)), some);
    store_some(held + j, from_bits(bits(level) | sign), some);
  });
  pack<2>(wide, size, codes);
}

void decode0(const uint8_t*, int, const uint16_t*, float, int size, float* x) {
  memset(x, 0, static_cast<size_t>(size) * sizeof *x);
}

void encode0(const float*, float, int size, uint8_t*, uint16_t*, float* held) {
  memset(held, 0, static_cast<size_t>(size) * sizeof *held);
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
