// How momentum gets its packed codes.
#pragma once

#include "packed.h"

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

// Of a block that is neither tiny nor has an infinity; false where it has NaN.
CAME8BIT_INLINE bool levels_of_usual(const float* x, float largest, int size, WideCodes& wide) {
  const F scale(4.0f * usual_level_scale(largest, kLargestSquare4));
  const auto quadruple = [&](int j) CAME8BIT_LAMBDA {
    const F value = load(x + j);
    return with_sign(truncate(level_square(value, scale)), value);
  };
  constexpr int k = kLanes;
  bool usual = true;
  for (int j = 0; j < size; j += 4 * k) {
    usual &= store_levels4(wide + j, quadruple(j), quadruple(j + k), quadruple(j + 2 * k),
                           quadruple(j + 3 * k));
  }
  return usual;
}

CAME8BIT_INLINE void encode4_block(const float* x, float largest, int size, uint8_t* codes,
                                   uint16_t* scale, float* held) {
  alignas(64) WideCodes wide;
  const bool odd = largest < kTinyAbsmax || largest == INFINITY;
  if (odd || size % 64 != 0 || !levels_of_usual(x, largest, size, wide)) {
    if (largest == INFINITY) largest = largest_finite(x, size);
    odd ? encode_block<false, true>(x, nullptr, largest, kLargestSquare4, size, wide)
        : encode_block<false, false>(x, nullptr, largest, kLargestSquare4, size, wide);
    for (int i = 0; i < size; ++i) wide[i] = wide[i] < kNanCode4 ? kNanCode4 : wide[i];
  }
  *scale = scale_bits(largest < kSmallestAbsmax ? 0.0f : largest);
  const F levels = levels4(scale_of(*scale));
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    store_some(held + j, look_up(levels, load_some(wide + j, some)), some);
  });
  pack<4>(wide, size, codes);
}

void encode4(const float* x, const float* largest, int count, int size, uint8_t* codes,
             uint16_t* scales, float* held) {
  for (int i = 0; i < count; ++i) {
    encode4_block(x + i * size, largest[i], size, codes + i * size / 2, scales + i,
                  held + i * size);
  }
}

// Short rows that are blocks, up to one that is not usual or has NaN.
template <int cols>
CAME8BIT_INLINE int encode4_short_rows(const float* x, ToEncode blocks, int count, uint8_t* codes,
                                       uint16_t* scales, float* held) {
  typedef ShortRows<cols> Rows;
  const F unit_levels = levels4(1.0f);
  int block = 0;
  for (; block + Rows::kRows <= count; block += Rows::kRows, x += 64, held += 64, codes += 32) {
    if (!usual_rows<cols>(blocks, block)) return block;
    const float* const largest = blocks.largest + block;
    float scale[kLanes], stored[Rows::kRows];
    store(scale, usual_level_scale(load(largest), F(kLargestSquare4)) * F(4.0f));
    I quadruple[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const F value = load(x + v * kLanes);
      const F square = level_square(value, Rows::of_rows(scale, v));
      quadruple[v] = with_sign(truncate(square), value);
    }
    alignas(64) int8_t wide[64];
    if (!store_levels4(wide, quadruple[0], quadruple[1], quadruple[2], quadruple[3])) return block;
    for (int i = 0; i < Rows::kRows; ++i) {
      scales[block + i] = scale_bits(largest[i]);
      stored[i] = scale_of(scales[block + i]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const F level = look_up(unit_levels, load(wide + v * kLanes));
      store(held + v * kLanes, level * Rows::of_rows(stored, v));
    }
    pack_64<4>(wide, codes);
  }
  return block;
}
int encode4_rows(const float* x, ToEncode blocks, int count, int size, uint8_t* codes,
                 uint16_t* scales, float* held) {
  return for_short_rows(size, [&](auto cols) CAME8BIT_LAMBDA {
    return encode4_short_rows<cols()>(x, blocks, count, codes, scales, held);
  });
}

// The codes of values as bytes, and what they stand for.
CAME8BIT_INLINE void store_code2(F x, M above, F level, int some, int8_t* wide, float* held) {
  const F zero(0.0f);
  const M negative = (x < zero) & (level > zero);
  const I sign = select(negative, I(INT32_MIN), I(0));
  store_some(wide, select(above, I(1), I(0)) | select(negative, I(2), I(0)), some);
  store_some(held, from_bits(bits(level) | sign), some);
}

// A block of 2 bits on its way to its codes; the total is in units.
struct Block2 {
  Unit unit;
  float total;
  bool has_zero;
  Levels levels;
};

// Stages of the encoding of `size` values, each of which waits for sums of the one before; with
// `full`, of kCoarseBlock values. Magnitudes in units, `whole`, are 0 in lanes past the end.
template <bool full>
struct Encode2 {
  template <class Run>
  static CAME8BIT_INLINE void for_lanes(int size, Run run) {
    if (full) size = kCoarseBlock;
    for (int j = 0; j < size; j += kLanes) run(j, full ? kLanes : size - j);
  }

  static CAME8BIT_INLINE M above_mean(const Block2& block, F whole, int size) {
    return came8bit::above_mean(whole, F(static_cast<float>(size)), F(block.total));
  }

  static CAME8BIT_INLINE void magnitudes(const float* x, float largest, int size, float* whole,
                                         Block2& block) {
    const bool usual = largest < INFINITY;
    block.unit = unit_of_block(usual ? largest : largest_finite(x, size));
    const F zero(0.0f), inverse(block.unit.inverse);
    F sum(zero);
    unsigned zeros = 0;
    for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
      F magnitude = larger(abs(load_some(x + j, some)), zero);  // 0 for NaN
      if (!usual) magnitude = select(magnitude < F(INFINITY), magnitude, zero);
      const unsigned here = some < kLanes ? (1u << some) - 1 : (1u << kLanes) - 1;
      zeros |= mask(magnitude == zero) & here;
      const F units = nearest_whole(magnitude * inverse);
      store(whole + j, units);
      sum = sum + units;
    });
    block.total = sum_lanes(sum);
    block.has_zero = zeros != 0;
  }

  static CAME8BIT_INLINE void choose_levels(const float* whole, int size, Block2& block) {
    const F zero(0.0f);
    F sum(zero);
    int above_count = 0;
    for_lanes(size, [&](int j, int) CAME8BIT_LAMBDA {
      const F units = load(whole + j);
      const M above = above_mean(block, units, size);
      above_count += count(above);
      sum = sum + select(above, units, zero);
    });
    block.levels =
        levels_of_block(block.total, static_cast<float>(size), sum_lanes(sum),
                        static_cast<float>(above_count), block.has_zero, block.unit.unit);
  }

  static CAME8BIT_INLINE void codes(const float* x, const float* whole, int size,
                                    const Block2& block, uint8_t* codes, uint16_t* scales,
                                    float* held) {
    alignas(64) WideCodes wide;
    const Levels levels = block.levels;
    const F low(levels.low), high(levels.high);
    Block2 split = block;
    if (!(levels.high > levels.low)) split.total = INFINITY;  // nothing is above
    for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
      const M above = above_mean(split, load(whole + j), size);
      const F level = select(above, high, low);
      store_code2(load_some(x + j, some), above, level, some, wide + j, held + j);
    });
    pack<2>(wide, size, codes);
    scales[0] = scale_bits(levels.low);
    scales[1] = scale_bits(levels.high);
  }

  static CAME8BIT_INLINE void run(const float* x, const float* largest, int count, int size,
                                  uint8_t* packed, uint16_t* scales, float* held) {
    alignas(64) float whole[kPiece];
    Block2 blocks[kPiece / kCoarseBlock];
    for (int i = 0; i < count; ++i) {
      magnitudes(x + i * size, largest[i], size, whole + i * kCoarseBlock, blocks[i]);
    }
    for (int i = 0; i < count; ++i) choose_levels(whole + i * kCoarseBlock, size, blocks[i]);
    for (int i = 0; i < count; ++i) {
      codes(x + i * size, whole + i * kCoarseBlock, size, blocks[i], packed + i * size / 4,
            scales + 2 * i, held + i * size);
    }
  }
};

void encode2(const float* x, const float* largest, int count, int size, uint8_t* codes,
             uint16_t* scales, float* held) {
  size == kCoarseBlock ? Encode2<true>::run(x, largest, count, size, codes, scales, held)
                       : Encode2<false>::run(x, largest, count, size, codes, scales, held);
}

// Short rows that are blocks, up to one that is not usual; as the stages of Encode2.
template <int cols>
CAME8BIT_INLINE int encode2_short_rows(const float* x, ToEncode blocks, int count, uint8_t* codes,
                                       uint16_t* scales, float* held) {
  typedef ShortRows<cols> Rows;
  const F zero(0.0f), size(static_cast<float>(cols));
  int block = 0;
  for (; block + Rows::kRows <= count; block += Rows::kRows, x += 64, held += 64, codes += 16) {
    if (!usual_rows<cols>(blocks, block)) return block;
    float unit[Rows::kRows], inverse[Rows::kRows], total[kLanes], above_sum[kLanes];
    for (int i = 0; i < Rows::kRows; ++i) {
      const Unit of_row = unit_of_block(blocks.largest[block + i]);
      unit[i] = of_row.unit;
      inverse[i] = of_row.inverse;
    }
    F units[kVectors], units_above[kVectors];
    uint64_t zeros = 0, above = 0;
    for (int v = 0; v < kVectors; ++v) {
      const F magnitude = larger(abs(load(x + v * kLanes)), zero);  // 0 for NaN
      zeros |= static_cast<uint64_t>(mask(magnitude == zero)) << v * kLanes;
      units[v] = nearest_whole(magnitude * Rows::of_rows(inverse, v));
    }
    Rows::over_rows(units, add_lanes, total);
    for (int v = 0; v < kVectors; ++v) {
      const M is_above = above_mean(units[v], size, Rows::of_rows(total, v));
      above |= static_cast<uint64_t>(mask(is_above)) << v * kLanes;
      units_above[v] = select(is_above, units[v], zero);
    }
    Rows::over_rows(units_above, add_lanes, above_sum);
    float low[Rows::kRows], high[Rows::kRows];
    for (int i = 0; i < Rows::kRows; ++i) {
      constexpr uint64_t of_row = (uint64_t{1} << cols) - 1;
      const int above_count = bit_count(static_cast<unsigned>(above >> i * cols & of_row));
      const Levels levels =
          levels_of_block(total[i], cols, above_sum[i], static_cast<float>(above_count),
                          (zeros >> i * cols & of_row) != 0, unit[i]);
      low[i] = levels.low;
      high[i] = levels.high;
      scales[2 * (block + i)] = scale_bits(levels.low);
      scales[2 * (block + i) + 1] = scale_bits(levels.high);
      if (!(levels.high > levels.low)) total[i] = INFINITY;  // nothing is above
    }
    alignas(64) int8_t wide[64];
    for (int v = 0; v < kVectors; ++v) {
      const M is_above = above_mean(units[v], size, Rows::of_rows(total, v));
      const F level = select(is_above, Rows::of_rows(high, v), Rows::of_rows(low, v));
      store_code2(load(x + v * kLanes), is_above, level, kLanes, wide + v * kLanes,
                  held + v * kLanes);
    }
    pack_64<2>(wide, codes);
  }
  return block;
}
int encode2_rows(const float* x, ToEncode blocks, int count, int size, uint8_t* codes,
                 uint16_t* scales, float* held) {
  return for_short_rows(size, [&](auto cols) CAME8BIT_LAMBDA {
    return encode2_short_rows<cols()>(x, blocks, count, codes, scales, held);
  });
}

void encode0(const float*, const float*, int count, int size, uint8_t*, uint16_t*, float* held) {
  memset(held, 0, static_cast<size_t>(count * size) * sizeof *held);
}

int encode0_rows(const float*, ToEncode, int, int, uint8_t*, uint16_t*, float*) {
  return 0;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
