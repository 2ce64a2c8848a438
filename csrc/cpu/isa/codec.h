// The codes of the momentum.
#pragma once

#include "short_rows.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

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

// The guess of the code of a magnitude, and the code from it: encode_block has a pass for each.
CAME8BIT_INLINE I guess_of(F square, F to_next) {
  // The truncation of NaN is the smallest integer, which a store saturates to kNanCode.
  return truncate(code_guess(rough_root(square), to_next));
}
CAME8BIT_INLINE I code_of(F x, F square, I guess, F to_next) {
  const F next = square_of_next(to_float(guess), to_next);
  return with_sign(increment_if(next <= square, guess), x);
}

// Codes to nearest of 64 elements from their squares. Returns whether they are good, which these
// always are; what an instruction set does better is an overload.
template <class V>
CAME8BIT_INLINE bool store_nearest(int8_t* codes, const V* x, const V* square) {
  const V to_next(kNearestStep);
  I code[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    code[v] = code_of(x[v], square[v], guess_of(square[v], to_next), to_next);
  }
  store_codes(codes, code[0], code[1], code[2], code[3]);
  return true;
}

// To nearest, where there are registers enough; false where this way is not for the block.
CAME8BIT_INLINE bool encode_at_once(const float* x, float largest, int size, int8_t* codes) {
  if (!kManyRegisters || size % 64 != 0) return false;
  const F scale(usual_level_scale(largest, kLargestSquare));
  bool good = true;
  for (int j = 0; j < size; j += 64) {
    F value[kVectors], square[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load(x + j + v * kLanes);
      square[v] = level_square(value[v], scale);
    }
    good &= store_nearest(codes + j, value, square);
  }
  return good;
}

// `some_steps` says that `step` is there; `odd` that x has an infinity or is tiny. In two passes:
// the processor waits less where chains of operations are short.
template <bool some_steps, bool odd>
CAME8BIT_INLINE void encode_block(const float* x, const float* step, float absmax,
                                  float largest_square, int size, int8_t* codes) {
  alignas(64) float square[kBlockSize];
  alignas(64) int32_t guess[kBlockSize];
  const F scale(level_scale(absmax, largest_square));
  const F factor(absmax < kTinyAbsmax ? kTinyFactor : 1.0f);
  const auto to_next = [&](int j, int some) CAME8BIT_LAMBDA {
    return some_steps ? load_some(step + j, some) : F(kNearestStep);
  };
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    F value = load_some(x + j, some);
    if (odd) value = select(abs(value) < F(INFINITY), value, F(NAN)) * factor;
    const F s = level_square(value, scale);
    store(square + j, s);
    store(guess + j, guess_of(s, to_next(j, some)));
  });
  const auto lanes = [&](int j, int some) CAME8BIT_LAMBDA {
    return code_of(load_some(x + j, some), load(square + j), load(guess + j), to_next(j, some));
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
  if (!odd && step == nullptr && encode_at_once(x, largest, size, codes)) return largest;
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

// Whether of the short rows from `block` on, which are encoded together, none decays, has an
// infinity or is tiny.
template <int cols>
CAME8BIT_INLINE bool usual_rows(ToEncode blocks, int block) {
  constexpr int rows = ShortRows<cols>::kRows;
  const bool none[rows] = {};
  const F largest = load(blocks.largest + block);
  const M usual = (F(kTinyAbsmax) <= largest) & (largest < F(INFINITY));
  return ((~mask(usual)) & ((1u << rows) - 1)) == 0 &&
         memcmp(blocks.decays + block, none, sizeof none) == 0;
}

// Short rows that are blocks, up to one that this way is not for.
template <int cols>
CAME8BIT_INLINE int encode_short_rows(const float* x, ToEncode blocks, int count, int8_t* codes,
                                      float* absmax) {
  typedef ShortRows<cols> Rows;
  int block = 0;
  for (; block + Rows::kRows <= count; block += Rows::kRows, x += 64, codes += 64) {
    if (!usual_rows<cols>(blocks, block)) return block;
    float scale[kLanes];
    store(scale, usual_level_scale(load(blocks.largest + block), F(kLargestSquare)));
    memcpy(absmax + block, blocks.largest + block, Rows::kRows * sizeof(float));
    F value[kVectors], square[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load(x + v * kLanes);
      square[v] = level_square(value[v], Rows::of_rows(scale, v));
    }
    if (!store_nearest(codes, value, square)) return block;
  }
  return block;
}
int encode_rows(const float* x, ToEncode blocks, int count, int size, int8_t* codes,
                float* absmax) {
  return for_short_rows(size, [&](auto cols) CAME8BIT_LAMBDA {
    return encode_short_rows<cols()>(x, blocks, count, codes, absmax);
  });
}

// Of codes that are not kNanCode.
CAME8BIT_INLINE F decode_usual(const int8_t* codes, F absmax, int size) {
  return came8bit::decode(to_float(load_some(codes, size)), absmax);
}

CAME8BIT_INLINE bool has_nan(const int8_t* codes, int size) {
  int j = 0;
  for (; j + 64 <= size; j += 64) {
    if (one_of_64_is(codes + j, kNanCode)) return true;
  }
  M found = F(0.0f) < F(0.0f);
  for (; j < size; j += kLanes) found = found | (load_some(codes + j, size - j) == I(kNanCode));
  return any(found);
}

void decode(const int8_t* codes, float absmax, int size, float* x) {
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    store_some(x + j, decode_usual(codes + j, F(absmax), some), some);
  });
  if (!has_nan(codes, size)) return;
  for (int j = 0; j < size; ++j) {
    if (codes[j] == kNanCode) x[j] = NAN;
  }
}

// Calls run(momentum) for a block, where momentum(j, size) is that of the lanes at `j`, times
// `factor`.
template <class Run>
CAME8BIT_INLINE void with_momentum(const float* m, const float*, float factor, int, Run run) {
  run([=](int j, int some) CAME8BIT_LAMBDA { return load_some(m + j, some) * F(factor); });
}
template <class Run>
CAME8BIT_INLINE void with_momentum(const int8_t* codes, const float* absmax, float factor, int size,
                                   Run run) {
  const float scale = *absmax * factor;
  if (has_nan(codes, size)) {
    alignas(64) float decoded[kBlockSize];
    decode(codes, scale, size, decoded);
    run([&](int j, int some) CAME8BIT_LAMBDA { return load_some(decoded + j, some); });
  } else {
    run([=](int j, int some) CAME8BIT_LAMBDA { return decode_usual(codes + j, F(scale), some); });
  }
}

// The same for one vector of short rows, where no code is NaN.
template <int cols>
CAME8BIT_INLINE F momentum_of_rows(const float* m, const float*, F factor, int vector) {
  return load(m + vector * kLanes) * factor;
}
template <int cols>
CAME8BIT_INLINE F momentum_of_rows(const int8_t* codes, const float* absmax, F factor, int vector) {
  const F scale = ShortRows<cols>::of_rows(absmax, vector) * factor;
  return decode_usual(codes + vector * kLanes, scale, kLanes);
}
CAME8BIT_INLINE bool has_nan(const float*, int) {
  return false;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
