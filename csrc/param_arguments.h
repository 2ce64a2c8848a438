// One parameter with its state as plain pointers: what the kernels of every device work on.
#pragma once

#include "dtypes.h"

namespace came8bit {

// Matrices: b of n x k; what does not apply is null.
struct ParamArguments {
  Dtype param_dtype, grad_dtype;
  int64_t b, n, k;
  int64_t slices, slice_len, blocks_per_slice;  // the first dimension, what lies behind it: blocks
  uint64_t offset;           // row-major index of the first element in the full parameter
  uint32_t index;            // of the parameter, for its random bits
  int bits;                  // of the momentum: 32, 8, 4, 2 or 0
  void* exp_avg;             // int8 codes with `absmax`, packed codes with `scales`, or fp32
  float* absmax;             // [slices][blocks_per_slice]
  uint16_t* scales;          // bf16, with 2 bits two a block
  float *sq_row, *sq_col;    // [b][n], [b][k]
  float *res_row, *res_col;  //
  float* rms_ratio;          // measured over predicted RMS of u
  float* exp_avg_sq;         // full second moment instead of the five above
  int64_t *step, *skipped;
  float* grad_square;  // null, or where the sum of squares of the gradient is wanted

  CAME8BIT_INLINE int64_t numel() const { return b * n * k; }
  CAME8BIT_INLINE bool coarse() const { return bits < 8; }
};

// The passes of a step, as in came8bit/reference/passes.py.
enum class Pass { kSecondMoment, kInstability, kConfidence, kApply };

// Values of a parameter that stay here between its passes, at the beginning of `work`.
enum Kept { kLeft, kKappa0, kPredictedRms, kKappa, kKept };

// Beside the parameter, where some of its rows may be elsewhere. What does not apply is null.
struct SharedArguments {
  int64_t full_numel, full_rows;  // of the full parameter; no rows where whole matrices are here
  const double* reduced;
  double* sums;
  int64_t sums_size;
  float* work;
};

}  // namespace came8bit
