// Coarse codes of the momentum, of 4, 2 and 0 bits.
#pragma once

#include "codec.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Codes of `bits` bits as bytes, with room for what fills the last packed byte.
typedef int8_t WideCodes[kCoarseBlock + 8];

// The lowest `bits` bits of eight bytes, one behind the other.
template <int bits>
CAME8BIT_INLINE uint64_t squeezed(uint64_t x) {
  if (bits == 4) {
    x &= 0x0f0f0f0f0f0f0f0fu;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
    x = (x | x >> 8) & 0x0000ffff0000ffffu;
    return x | x >> 16;
  }
  x &= 0x0303030303030303u;
  x = (x | x >> 6) & 0x000f000f000f000fu;
  x = (x | x >> 12) & 0x000000ff000000ffu;
  return x | x >> 24;
}

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first code is in the lowest bits");
#endif

template <int bits>
CAME8BIT_INLINE void pack(WideCodes& wide, int size, uint8_t* codes) {
  memset(wide + size, 0, 8);
  const int bytes = (size * bits + 7) / 8;
  // As many bytes as a code has bits hold eight codes.
  const auto eight = [&](int i) CAME8BIT_LAMBDA {
    uint64_t codes_of_eight;
    memcpy(&codes_of_eight, wide + i * (8 / bits), sizeof codes_of_eight);
    return squeezed<bits>(codes_of_eight);
  };
  int i = 0;
  for (; i + bits <= bytes; i += bits) {
    const uint64_t packed = eight(i);
    memcpy(codes + i, &packed, bits);
  }
  if (i < bytes) {
    const uint64_t packed = eight(i);
    memcpy(codes + i, &packed, static_cast<size_t>(bytes - i));
  }
}

// What each of the sixteen patterns of four bits stands for; of two bits, each four times.
struct Levels4 {
  alignas(64) float value[16];
  explicit CAME8BIT_INLINE Levels4(float scale) {
    alignas(64) const float number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, -7, -6, -5, -4, -3, -2, -1};
    store(value, came8bit::decode4(load(number), F(scale)));
    value[kNanCode4 + 16] = NAN;
  }
};
struct Levels2 {
  alignas(64) float value[16];
  CAME8BIT_INLINE Levels2(float low, float high) {
    alignas(64) const float is_high[16] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
    alignas(64) const float sign[16] = {0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f,
                                        0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f};
    const F level = select(load(is_high) > F(0.0f), F(high), F(low));
    store(value, from_bits(bits(level) ^ bits(load(sign))));
  }
};

template <int bits>
CAME8BIT_INLINE void decode_packed(const uint8_t* codes, int skip, const float (&value)[16],
                                   int size, float* x) {
  int j = 0;
  for (; skip == 0 && j + kLanes <= size; j += kLanes) {
    store(x + j, look_up(value, load_packed<bits>(codes + j * bits / 8)));
  }
  for (; j < size; ++j) {
    const int at = (j + skip) * bits;
    x[j] = value[codes[at / 8] >> at % 8 & ((1 << bits) - 1)];
  }
}

void decode4(const uint8_t* codes, int skip, const uint16_t* scale, float factor, int size,
             float* x) {
  decode_packed<4>(codes, skip, Levels4(scale_of(*scale) * factor).value, size, x);
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
  const Levels4 levels(scale_of(*scale));
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    store_some(held + j, look_up(levels.value, load_some(wide + j, some)), some);
  });
  pack<4>(wide, size, codes);
}

void decode2(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
             float* x) {
  const Levels2 levels(scale_of(scales[0]) * factor, scale_of(scales[1]) * factor);
  decode_packed<2>(codes, skip, levels.value, size, x);
}

void encode2(const float* x, float largest, int size, uint8_t* codes, uint16_t* scales,
             float* held) {
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
