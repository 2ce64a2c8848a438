// The 8-bit code of the momentum: see came8bit/quant.py, which states its laws.
#pragma once

#include "came_math.h"

namespace came8bit {

constexpr int kBlockSize = 256;
constexpr int kNanCode = -128;
constexpr float kNearestBias = 0.5f;
constexpr float kDecayBias = 0x1p-14f;
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

// Truncate this to get the magnitude of the code of a finite x.
template <class T>
CAME8BIT_INLINE T code_level(T x, T inverse, T bias) {
  return sqrt(abs(x) * inverse) * T(127.0f) + bias;
}

}  // namespace came8bit
