// Coarse codes of the momentum, of 4, 2 and 0 bits.
#pragma once

#include "codec.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// A byte of packed codes.
template <int bits>
struct Packed {
  uint8_t byte;
};

// Where element j of stored momentum is; of packed codes one that begins a byte.
template <class MT>
CAME8BIT_INLINE const MT* advance(const MT* m, int64_t j) {
  return m + j;
}
template <int bits>
CAME8BIT_INLINE const Packed<bits>* advance(const Packed<bits>* codes, int64_t j) {
  return codes + j * bits / 8;
}
template <int bits>
CAME8BIT_INLINE void ask_for(const Packed<bits>* codes, int j, int64_t ahead) {
  if (j * bits / 8 % kLineBytes == 0) prefetch(advance(codes, j + ahead));
}
template <class MT>
CAME8BIT_INLINE const MT* row_of(const void* m, int64_t row, int64_t stride) {
  return reinterpret_cast<const MT*>(static_cast<const char*>(m) + row * stride);
}

// Of each kind of stored momentum: bits of an element, values in a block, scales of a block.
template <class MT>
struct Kind {
  typedef float Scale;
  static constexpr int kBits = 8 * sizeof(MT), kBlock = kBlockSize, kScales = 1;
};
template <int bits>
struct Kind<Packed<bits>> {
  typedef uint16_t Scale;
  static constexpr int kBits = bits, kBlock = kCoarseBlock, kScales = scales_of_block(bits);
};
template <class MT>
constexpr int kBlockOf = Kind<MT>::kBlock;
template <class MT>
CAME8BIT_INLINE constexpr int64_t bytes_of(int64_t size) {
  return size * Kind<MT>::kBits / 8;
}
// The scales of a block, `before` scales behind the first ones.
template <class MT>
CAME8BIT_INLINE const typename Kind<MT>::Scale* scales_from(const void* scales, int64_t block,
                                                            int64_t before = 0) {
  return static_cast<const typename Kind<MT>::Scale*>(scales) + before + block * Kind<MT>::kScales;
}

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

// What the codes of a block stand for.
template <int bits>
CAME8BIT_INLINE F levels_of(const uint16_t* scales, float factor) {
  if (bits == 4) return levels4(scale_of(scales[0]) * factor);
  return levels2(scale_of(scales[0]) * factor, scale_of(scales[1]) * factor);
}

template <int bits, class Run>
CAME8BIT_INLINE void with_momentum(const Packed<bits>* codes, const uint16_t* scales, float factor,
                                   int, Run run) {
  const F levels = levels_of<bits>(scales, factor);
  run([=](int j, int some) CAME8BIT_LAMBDA {
    const uint8_t* packed = &advance(codes, j)->byte;
    if (some == kLanes) return look_up(levels, load_packed<bits>(packed));
    alignas(64) float decoded[kLanes] = {};
    decode_packed<bits>(packed, 0, levels, some, decoded);
    return load(decoded);
  });
}

// The same for one vector of short rows.
template <int cols>
CAME8BIT_INLINE F momentum_of_rows(const Packed<4>* codes, const uint16_t* scales, F factor,
                                   int vector) {
  float of_row[64 / cols];
  for (int i = 0; i < 64 / cols; ++i) of_row[i] = scale_of(scales[i]);
  const I packed = load_packed<4>(&advance(codes, vector * kLanes)->byte);
  return look_up(levels4(1.0f), packed) * (ShortRows<cols>::of_rows(of_row, vector) * factor);
}
template <int cols>
CAME8BIT_INLINE F momentum_of_rows(const Packed<2>* codes, const uint16_t* scales, F factor,
                                   int vector) {
  typedef ShortRows<cols> Rows;
  float low[Rows::kRows], high[Rows::kRows];
  for (int i = 0; i < Rows::kRows; ++i) {
    low[i] = scale_of(scales[2 * i]);
    high[i] = scale_of(scales[2 * i + 1]);
  }
  const I packed = load_packed<2>(&advance(codes, vector * kLanes)->byte);
  const M above = look_up(levels2(0.0f, 1.0f), packed & I(1)) > F(0.0f);
  const I sign = bits(look_up(levels2(0.0f, 0.0f), packed));
  const F level = select(above, Rows::of_rows(high, vector), Rows::of_rows(low, vector)) * factor;
  return from_bits(bits(level) ^ sign);
}
template <int bits>
CAME8BIT_INLINE bool has_nan(const Packed<bits>*, int) {
  return false;  // decodes like any other code
}

void decode4(const uint8_t* codes, int skip, const uint16_t* scale, float factor, int size,
             float* x) {
  decode_packed<4>(codes, skip, levels4(scale_of(*scale) * factor), size, x);
}

// Of a block that is neither tiny nor has an infinity; false where it has NaN.
CAME8BIT_INLINE bool levels_of_usual(const float* x, float largest, int size, WideCodes& wide) {
  const F scale(4.0f * usual_level_scale(largest, kLargestSquare4));
  const auto quarters = [&](int j) CAME8BIT_LAMBDA {
    const F value = load(x + j);
    return with_sign(truncate(level_square(value, scale)), value);
  };
  constexpr int k = kLanes;
  bool usual = true;
  for (int j = 0; j < size; j += 4 * k) {
    usual &= store_levels4(wide + j, quarters(j), quarters(j + k), quarters(j + 2 * k),
                           quarters(j + 3 * k));
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

void decode2(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
             float* x) {
  const F levels = levels2(scale_of(scales[0]) * factor, scale_of(scales[1]) * factor);
  decode_packed<2>(codes, skip, levels, size, x);
}

// A block of 2 bits on its way to its codes; sums are in units.
struct Block2 {
  Unit unit;
  float total, above_sum;
  int above_count;
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

  // Exact, as is the division by the power of two that the size of a full block is.
  static CAME8BIT_INLINE M above_mean(const Block2& block, F whole, int size) {
    if (full) return whole > F(block.total * (1.0f / kCoarseBlock));
    return whole * F(static_cast<float>(size)) > F(block.total);
  }

  static CAME8BIT_INLINE void magnitudes(const float* x, float largest, int size, float* whole,
                                         Block2& block) {
    const bool usual = largest < INFINITY;
    block.unit = unit_of_block(usual ? largest : largest_finite(x, size));
    const F zero(0.0f), inverse(block.unit.inverse), finite(usual ? NAN : INFINITY);
    F sum(zero);
    unsigned zeros = 0;
    for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
      F magnitude = larger(abs(load_some(x + j, some)), zero);  // 0 for NaN
      if (!usual) magnitude = select(magnitude < finite, magnitude, zero);
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
    const F zero(0.0f), low(levels.low), high(levels.high);
    Block2 split = block;
    if (!(levels.high > levels.low)) split.total = INFINITY;  // nothing is above
    for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
      const M above = above_mean(split, load(whole + j), size);
      const F level = select(above, high, low);
      const M negative = (load_some(x + j, some) < zero) & (level > zero);
      const I sign = select(negative, I(INT32_MIN), I(0));
      store_some(wide + j, select(above, I(1), I(0)) | select(negative, I(2), I(0)), some);
      store_some(held + j, from_bits(bits(level) | sign), some);
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

void decode0(const uint8_t*, int, const uint16_t*, float, int size, float* x) {
  memset(x, 0, static_cast<size_t>(size) * sizeof *x);
}

void encode0(const float*, const float*, int count, int size, uint8_t*, uint16_t*, float* held) {
  memset(held, 0, static_cast<size_t>(count * size) * sizeof *held);
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
