// The 8-bit code of the momentum: see came8bit/quant.py, which states its laws.
#pragma once

#include "came_math.h"

namespace came8bit {

constexpr int kBlockSize = 256;
constexpr int kNanCode = -128;
// 1 - bias: what must be added to a level to reach the point from which the next one is taken.
constexpr float kNearestStep = 0.5f;
constexpr float kDecayStep = 1.0f - 0x1p-14f;
constexpr float kSmallestAbsmax = 0x1p-126f;
constexpr float kInverse127 = 1.0f / 127.0f;

// Value of a code, given as a number of type T; not for kNanCode.
template <class T>
CAME8BIT_INLINE T decode(T code, T absmax) {
  const T t = code * T(kInverse127);
  return (t * abs(t)) * absmax;
}

// 1/absmax, or 0 for a block that stores zeros.
CAME8BIT_INLINE float inverse_absmax(float absmax) {
  return absmax < kSmallestAbsmax ? 0.0f : 1.0f / absmax;
}

// Square of the level that x would have on a continuous scale; the code is the largest whole level
// q with (q - bias)^2 <= square.
template <class T>
CAME8BIT_INLINE T level_square(T x, T inverse) {
  return (abs(x) * inverse) * T(16129.0f);
}

// The magnitude of the code from any `root` within 0.05 of sqrt(square): the guess errs at most by
// one, downwards, and the comparison makes it exact. NaN for NaN.
template <class T>
CAME8BIT_INLINE T code_level(T square, T root, T step) {
  const T guess = whole(root + (T(0.9375f) - step));
  const T next = guess + step;
  return select(next * next > square, guess, guess + T(1.0f));
}

}  // namespace came8bit
