// One CAME step of a list of parameters, given as plain pointers.
#pragma once

#include <vector>

#include "strided.h"

namespace came8bit {

// One parameter with its state. Matrices: b of n x k; the others are null where they do not apply.
struct Parameter {
  StridedRuns param, grad;
  int64_t b, n, k;
  uint32_t index;
  uint64_t offset;            // row-major index of the first element in the full parameter
  int64_t slices, slice_len;  // the first dimension, and what lies behind it: 8-bit blocks
  void* exp_avg;              // int8 codes with `absmax`, or fp32
  float* absmax;              // [slices][blocks], null for fp32 momentum
  float *sq_row, *sq_col;     // [b][n], [b][k]
  float *res_row, *res_col;   //
  float* rms_ratio;           // measured over predicted RMS of u
  float* exp_avg_sq;          // full second moment instead of the five above
  int64_t *step, *skipped;

  int64_t numel() const { return b * n * k; }
};

// Scalars of a call, already rounded to fp32 where the rule needs that.
struct Settings {
  double beta1, beta2, beta3;
  float eps1, eps2, clip_threshold, lr, shrink;
  bool stochastic, cautious, propagate, maximize, bias_correction;
  uint64_t seed;
};

void factored_step(const std::vector<Parameter>& parameters, const Settings& settings);
void unfactored_step(const std::vector<Parameter>& parameters, const Settings& settings);

// Codec of contiguous memory: slices x slice_len values.
void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax);
void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x);

}  // namespace came8bit
