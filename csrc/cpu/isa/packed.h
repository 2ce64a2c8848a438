// Momentum in packed codes, of 4, 2 and 0 bits, as the sweeps read it.
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
  decode_packed<4>(codes, skip, levels_of<4>(scale, factor), size, x);
}

void decode2(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
             float* x) {
  decode_packed<2>(codes, skip, levels_of<2>(scales, factor), size, x);
}

void decode0(const uint8_t*, int, const uint16_t*, float, int size, float* x) {
  memset(x, 0, static_cast<size_t>(size) * sizeof *x);
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
