// Scalars of a call. What the rule combines is formed in float64 and rounded to fp32 once, here.
#pragma once

#include "update.h"

namespace came8bit {

// Passed to CUDA kernels by value.
struct StepSettings {
  double betas[3];  // for the powers of the bias correction
  float beta1, beta2, beta3, one_minus_beta1, one_minus_beta2, one_minus_beta3, beta1_squared;
  float eps1, eps2, clip_threshold, lr, shrink, weight_decay;
  const float* lr_tensor;  // null, or on the device: replaces lr and shrink
  bool stochastic, cautious, propagate, maximize, bias_correction, nesterov;
  uint64_t seed;

  // In the order of the schema.
  StepSettings(const float* lr_tensor, double lr, double beta1, double beta2, double beta3,
               double eps1, double eps2, double clip_threshold, double weight_decay,
               bool stochastic, bool cautious, bool propagate, bool maximize, bool bias_correction,
               bool nesterov, int64_t seed)
      : betas{beta1, beta2, beta3},
        beta1(static_cast<float>(beta1)),
        beta2(static_cast<float>(beta2)),
        beta3(static_cast<float>(beta3)),
        one_minus_beta1(static_cast<float>(1.0 - beta1)),
        one_minus_beta2(static_cast<float>(1.0 - beta2)),
        one_minus_beta3(static_cast<float>(1.0 - beta3)),
        beta1_squared(static_cast<float>(beta1 * beta1)),
        eps1(static_cast<float>(eps1)),
        eps2(static_cast<float>(eps2)),
        clip_threshold(static_cast<float>(clip_threshold)),
        lr(static_cast<float>(lr)),
        shrink(shrink_of(lr, weight_decay)),
        weight_decay(static_cast<float>(weight_decay)),
        lr_tensor(lr_tensor),
        stochastic(stochastic),
        cautious(cautious),
        propagate(propagate),
        maximize(maximize),
        bias_correction(bias_correction),
        nesterov(nesterov),
        seed(static_cast<uint64_t>(seed)) {}

  // Learning rate, and what weight decay takes of p.
  struct Rate {
    float lr, shrink;
  };
  CAME8BIT_INLINE Rate rate() const {
    if (lr_tensor == nullptr) return {lr, shrink};
    return {*lr_tensor, shrink_of(*lr_tensor, weight_decay)};
  }

  // 1 - beta^step of betas[which]; 1 without bias correction.
  CAME8BIT_INLINE float correction(int which, int64_t step) const {
    return bias_correction ? came8bit::bias_correction(betas[which], step) : 1.0f;
  }

  // Sum of the weights of all gradients in the direction of the update.
  CAME8BIT_INLINE float direction_correction(int64_t step) const {
    return correction(0, nesterov ? step + 1 : step);
  }

  // What the steps to come would make of momentum now, relative to the scale of the update: the sum
  // of the powers of beta1, of which a look-ahead has the first behind it.
  CAME8BIT_INLINE float spent(int64_t step) const {
    const double beta1 = betas[0], rest = (nesterov ? beta1 * beta1 : beta1) / (1.0 - beta1);
    const double steps = static_cast<double>(nesterov ? step + 1 : step);
    return static_cast<float>(bias_correction ? rest * (1.0 - ::pow(beta1, steps)) : rest);
  }

  CAME8BIT_INLINE float sign() const { return maximize ? -1.0f : 1.0f; }
};

}  // namespace came8bit
