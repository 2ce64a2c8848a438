// The update rule, one scalar expression per function, for float and for vectors of float.
//
// The same passes, symbols and order of operations as came8bit/reference/update.py and
// docs/internals/algorithm.md. T is float on the GPU and a vector of 16 lanes on the CPU. Nothing
// here may be contracted into a fused multiply-add: build with -ffp-contract=off, --fmad=false.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace came8bit {

CAME8BIT_INLINE float sqrt(float x) {
  return ::sqrtf(x);
}
CAME8BIT_INLINE float abs(float x) {
  return ::fabsf(x);
}
CAME8BIT_INLINE float select(bool condition, float yes, float no) {
  return condition ? yes : no;
}

CAME8BIT_INLINE bool is_finite(float x) {
  return ::fabsf(x) < HUGE_VALF;
}

// What the 8-bit code needs of a number (quant.h).

// Cut to a whole number; the argument is at most 2^22 and above -1.
CAME8BIT_INLINE float whole(float x) {
#if defined(__CUDA_ARCH__)
  // Cheaper than a conversion: above 2^23 the spacing is 1.
  return __fadd_rz(::fmaxf(x, 0.0f), 0x1p23f) - 0x1p23f;
#else
  return ::truncf(x);
#endif
}
CAME8BIT_INLINE float increment_unless(bool condition, float x) {
  return condition ? x : x + 1.0f;
}
// Off by at most kRoughRootError for roots up to 128, twice what PTX promises (2^-23, relative).
constexpr float kRoughRootError = 0x1p-15f;
CAME8BIT_INLINE float rough_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#elif defined(CAME8BIT_SHIM)
  return bits_float(float_bits(::sqrtf(x)) ^ 2u);  // no better than a GPU's
#else
  return ::sqrtf(x);
#endif
}

// beta*old + (1-beta)*fresh
template <class T>
CAME8BIT_INLINE T ema(T old, T beta, T fresh, T one_minus_beta) {
  return old * beta + fresh * one_minus_beta;
}

// Mean of g^2 + eps1 from the sum of g^2.
template <class T>
CAME8BIT_INLINE T mean_square(T total, T count, T eps1) {
  return total / count + eps1;
}

// scale * sqrt(mean(r) / r_i); two roots, so that the quotient cannot overflow.
template <class T>
CAME8BIT_INLINE T row_factor(T r, T root_of_mean, T scale) {
  return (root_of_mean / sqrt(r)) * scale;
}

// 1 / sqrt(c_j / correction)
template <class T>
CAME8BIT_INLINE T column_factor(T c, T correction) {
  return T(1.0f) / sqrt(c / correction);
}

// u = g * row * column
template <class T>
CAME8BIT_INLINE T precondition(T g, T row, T column) {
  return (g * row) * column;
}

// u of a parameter with a full second moment.
template <class T>
CAME8BIT_INLINE T precondition_unfactored(T g, T v, T sign, T correction) {
  return (g * sign) / sqrt(v / correction);
}

template <class T>
CAME8BIT_INLINE T root_mean(T total, T count) {
  return sqrt(total / count);
}

// kappa = 1 / max(1, rms / clip_threshold)
template <class T>
CAME8BIT_INLINE T clip_scale(T rms, T clip_threshold) {
  const T ratio = rms / clip_threshold;
  return select(ratio > T(1.0f), T(1.0f) / ratio, T(1.0f));
}

// 1 - beta^step in float64, rounded once.
CAME8BIT_INLINE float bias_correction(double beta, int64_t step) {
  return static_cast<float>(1.0 - ::pow(beta, static_cast<double>(step)));
}

// What weight decay takes of p: of a number lr formed in float64, of a tensor in fp32.
CAME8BIT_INLINE float shrink_of(double lr, double weight_decay) {
  return static_cast<float>(lr * weight_decay);
}
CAME8BIT_INLINE float shrink_of(float lr, float weight_decay) {
  return lr * weight_decay;
}

// Sum of u^2 over a matrix if every g^2 were the product of its row and column sums: `row_ratio` is
// the sum of row_sum/r, `col_ratio` that of col_sum/c, `mean` that of r, `total` the sum of g^2.
CAME8BIT_INLINE float predicted_square(float row_ratio, float col_ratio, float mean,
                                       float correction2, float total) {
  return total > 0.0f ? ((row_ratio * mean) / total) * (col_ratio * correction2) : 0.0f;
}

// Measured over predicted RMS, 1 where that means nothing.
CAME8BIT_INLINE float next_rms_ratio(float rms, float predicted) {
  const float ratio = rms / predicted;
  return ratio > 0.0f && ratio < HUGE_VALF ? ratio : 1.0f;
}

// d = kappa_0*u - m, whose squares sweep B adds up.
template <class T>
CAME8BIT_INLINE T difference(T u, T kappa_0, T m) {
  return u * kappa_0 - m;
}

// Mean of (kappa*u - m_t)^2 + eps2 from sums around kappa_0; delta = kappa - kappa_0.
template <class T>
CAME8BIT_INLINE T mean_instability(T d2, T ud, T u2, T two_delta, T delta_squared, T count,
                                   T beta1_squared, T eps2) {
  const T square = ((d2 + ud * two_delta) + u2 * delta_squared) / count;
  return select(square < T(0.0f), T(0.0f), square) * beta1_squared + eps2;
}

// What u is multiplied by on its way into the momentum.
template <class T>
CAME8BIT_INLINE T gain(T kappa, T one_minus_beta1) {
  return kappa * one_minus_beta1;
}

// m_t = beta1*m + w, w = gain*u. With 8 bits `decayed` is decoded with beta1*absmax.
template <class T>
CAME8BIT_INLINE T momentum(T decayed, T w) {
  return decayed + w;
}

// Nesterov's direction beta1*m_t + w: one decay ahead of the momentum.
template <class T>
CAME8BIT_INLINE T look_ahead(T m, T w, T beta1) {
  return m * beta1 + w;
}

// direction + (m_t - held)*rest: what the code of the momentum forgets acts now.
template <class T>
CAME8BIT_INLINE T spend(T direction, T m, T held, T rest) {
  return direction + (m - held) * rest;
}

// Cautious mask: same strict sign.
template <class T>
CAME8BIT_INLINE auto agrees(T m, T w) -> decltype(m > w) {
  const T zero(0.0f);
  return ((m > zero) & (w > zero)) | ((m < zero) & (w < zero));
}

// (p - p*shrink) - update, shrink = lr*weight_decay
template <class T>
CAME8BIT_INLINE T decay_and_apply(T p, T shrink, T update) {
  return (p - p * shrink) - update;
}

// 1 / max(agreeing/count, 0.001)
CAME8BIT_INLINE float cautious_scale(float agreeing, float count) {
  const float fraction = agreeing / count;
  return 1.0f / (fraction < 1e-3f ? 1e-3f : fraction);
}

}  // namespace came8bit
