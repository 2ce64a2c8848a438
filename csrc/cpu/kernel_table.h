// What one instruction set has to provide: loops over tiles, segments and vectors. No allocation,
// no threads, no knowledge of tensors; `step.cpp` decides who does what.
#pragma once

#include "../quant.h"
#include "../rounding.h"
#include "../step_settings.h"

namespace came8bit {

constexpr int kLanes = 16;
constexpr int kChunk = 1024;  // columns of a tile; lane sums are formed per chunk
constexpr int kDraw = 64;     // elements whose random bits are drawn together
constexpr int kGroup = 4;     // rows whose column sums are added as (x0 + x1) + (x2 + x3)

// Rows x at most kChunk columns of a gradient, row-major with `stride` elements between rows.
struct SecondMomentTile {
  const void* grad;
  int64_t stride;
  int rows, cols;
  float* row_sum;  // [rows], written
  float* col_sum;  // [cols], added to
};

// The same with the momentum: int8 codes with absmax, or fp32.
struct InstabilityTile {
  const void* grad;
  int64_t stride;
  int rows, cols;
  const void* momentum;
  int64_t momentum_stride;
  const float* absmax;  // nullptr for fp32 momentum; blocks start at column 0
  int64_t absmax_stride;
  const float* row_factor;  // [rows]
  const float* col_factor;  // [cols]
  float kappa_0;
  float* row_sum[3];  // d*d, u*d, u*u: [rows], written
  float* col_sum[3];  // [cols], added to
};

// What is the same for all elements of a parameter in one step; `lr` and `shrink` are those of
// rate().
struct StepConstants : StepSettings {
  float gain, correction2, scale, spent;
  uint32_t index, step;
};

// At most kBlockSize consecutive elements of one row.
struct Segment {
  void* param;
  const void* grad;
  int size;
  float row_gain, update_row;  // factored; row factor of u times gain
  const float* col_factor;
  const float* update_col;
  float* exp_avg_sq;    // unfactored
  const int8_t* codes;  // 8-bit: codes, and the absmax they were made with times beta1
  float absmax;
  float* exp_avg;          // fp32 momentum, read and written; 8-bit: new momentum, written
  const uint16_t* random;  // nullptr where nothing is drawn
};

// The same for coarse momentum, whose update needs to know what its code has kept. `exp_avg` holds
// beta1 times the old momentum, then the new one.
struct CoarseSegment : Segment {
  float* w;     // written
  float* kept;  // written: what is to be encoded; then what the code holds
};

// What the encoding of a segment has to know (8-bit momentum only).
struct Applied {
  float largest;  // magnitude of the new momentum that is not NaN
  bool decays;    // whether some w is zero
};

// A coarse code of at most kCoarseBlock values. `encode` is given what `largest_magnitude` returns
// and replaces x by what the codes stand for; `decode` leaves out the first `skip` codes and
// multiplies scales by `factor`.
struct CoarseCode {
  void (*encode)(float* x, float largest, int size, uint8_t* codes, uint16_t* scales);
  void (*decode)(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
                 float* x);
};

struct Kernels {
  void (*second_moment[kDtypes])(const SecondMomentTile&);
  void (*instability8[kDtypes])(const InstabilityTile&);
  void (*instability32[kDtypes])(const InstabilityTile&);

  // Index: parameter dtype, gradient dtype.
  Applied (*apply8[kDtypes][kDtypes])(const StepConstants&, const Segment&);
  Applied (*apply32[kDtypes][kDtypes])(const StepConstants&, const Segment&);
  Applied (*apply8_unfactored[kDtypes][kDtypes])(const StepConstants&, const Segment&);
  Applied (*apply32_unfactored[kDtypes][kDtypes])(const StepConstants&, const Segment&);

  // Index: gradient dtype. Writes kDecayStep where w is zero, else kNearestStep.
  void (*steps[kDtypes])(const Segment&, float* step);

  // Index: gradient dtype. How many elements the cautious mask keeps.
  int (*agreeing8[kDtypes])(const StepConstants&, const Segment&);
  int (*agreeing32[kDtypes])(const StepConstants&, const Segment&);
  int (*agreeing8_unfactored[kDtypes])(const StepConstants&, const Segment&);
  int (*agreeing32_unfactored[kDtypes])(const StepConstants&, const Segment&);

  // Coarse codes: w and the new momentum; returns its largest magnitude, as `largest_magnitude`
  // does. Index: gradient dtype. Then the update from them; index: parameter and gradient dtype.
  float (*coarse_momentum[kDtypes])(const StepConstants&, const CoarseSegment&);
  float (*coarse_momentum_unfactored[kDtypes])(const StepConstants&, const CoarseSegment&);
  void (*coarse_apply[kDtypes][kDtypes])(const StepConstants&, const CoarseSegment&);
  void (*coarse_apply_unfactored[kDtypes][kDtypes])(const StepConstants&, const CoarseSegment&);
  int (*coarse_agreeing)(const float* w, const float* m, int size);
  CoarseCode code4, code2;

  // Lane sum of at most kChunk values of g*g, and of u*u for a full second moment.
  float (*sum_g2[kDtypes])(const void* grad, int size);
  float (*sum_u2[kDtypes])(const StepConstants&, const void* grad, const float* exp_avg_sq,
                           int size);

  // 16 random bits for each of `size` <= kBlockSize elements from row-major index `element` on.
  // Returns where in `buffer`, which holds kBlockSize + kDraw values, the first one is.
  const uint16_t* (*random_bits)(const StepConstants&, uint64_t element, int size,
                                 uint16_t* buffer);

  // The three take at most kBlockSize values. `largest` is what `largest_magnitude` returns, and
  // step == nullptr rounds to nearest. `encode` returns the absmax of the block.
  float (*largest_magnitude)(const float* x, int size);
  float (*encode)(const float* x, const float* step, float largest, int size, int8_t* codes);
  void (*decode)(const int8_t* codes, float absmax, int size, float* x);

  // Whole vectors.
  float (*lane_sum)(const float* x, int64_t size);
  float (*lane_sum_of_ratios)(const float* x, const float* y, int64_t size);  // of x/y
  void (*add)(float* sum, const float* x, int64_t size);
  void (*scale)(float* x, int64_t size, float factor);
  void (*second_moment_ema)(float* fresh, const float* old, const float* sum, int64_t size,
                            float count, float beta2, float one_minus_beta2, float eps1);
  void (*row_factors)(float* out, const float* r, int64_t size, float root_of_mean, float scale);
  void (*col_factors)(float* out, const float* c, int64_t size, float correction);
  void (*instability_ema)(float* average, const float* d2, const float* ud, const float* u2,
                          int64_t size, float delta, float count, float beta1_squared, float eps2,
                          float beta3, float one_minus_beta3);
};

extern const Kernels kernels_baseline;
#ifdef CAME8BIT_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef CAME8BIT_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif

// The table in use (dispatch.cpp).
const Kernels& kernels();

}  // namespace came8bit
