// What one instruction set has to provide: loops over tiles, segments and vectors. No allocation,
// no threads, no knowledge of tensors; `step.cpp` decides who does what.
#pragma once

#include "../quant.h"
#include "../rounding.h"
#include "../step_settings.h"

namespace came8bit {

constexpr int kLanes = 16;
constexpr int kChunk = 1024;  // columns of a tile; lane sums are formed per chunk
constexpr int kPiece = 512;   // elements that sweep C takes through its passes together
constexpr int kDraw = 64;     // room for random bits that are drawn along with a piece's
constexpr int kGroup = 4;     // rows whose column sums are added as (x0 + x1) + (x2 + x3)

// Rows x at most kChunk columns of a gradient, row-major with `stride` elements between rows.
struct SecondMomentTile {
  const void* grad;
  int64_t stride;
  int rows, cols;
  float* row_sum;  // [rows], written
  float* col_sum;  // [cols], added to
};

// The same with the momentum: codes whose blocks start at column 0, or fp32.
struct InstabilityTile {
  const void* grad;
  int64_t stride;
  int rows, cols;
  const void* momentum;
  int64_t momentum_stride;  // bytes
  const void* scales;       // absmax of 8 bits, bf16 of packed codes, nullptr for fp32
  int64_t scales_stride;
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

// At most kPiece consecutive elements of one row, or of several whole rows of one matrix that are
// blocks. Blocks of the code begin where it begins; a block that goes on in the next row is in
// several segments.
struct Segment {
  void* param;
  const void* grad;
  int rows, size, block_size;          // `size` of one row
  const float *row_gain, *update_row;  // factored, [rows]; row factor of u times gain
  const float *col_factor, *update_col;
  const float* exp_avg_sq;  // unfactored
  float* new_exp_avg_sq;    // null where it is not to change
  const void* old_exp_avg;  // codes, or fp32
  const void* scales;       // of the blocks of codes: absmax of 8 bits, bf16 of packed ones
  float decay;              // what the old momentum is multiplied by
  float *exp_avg, *w;       // the new momentum, and its part w
  const float* kept;        // what the code holds of exp_avg, where that matters, or null
  const uint16_t* random;   // null where nothing is drawn
};

// What the encoding of blocks has to know, zero at first. Behind `largest` are kLanes values more,
// which a vector of them may read.
struct ToEncode {
  float* largest;  // magnitudes of the new momentum that are not NaN
  bool* decays;    // whether some w is zero

  ToEncode from(int64_t block) const { return {largest + block, decays + block}; }
};

// A coarse code of at most kCoarseBlock values. `encode` is given one block, or up to kPiece values
// in full blocks, with what `largest_magnitude` returns of each, and writes what the codes stand
// for to `held`, which may be x. `encode_rows` encodes blocks of `size` values each, up to one that
// this way is not for, and returns how many. `decode` leaves out the first `skip` codes and
// multiplies scales by `factor`.
struct CoarseCode {
  void (*encode)(const float* x, const float* largest, int count, int size, uint8_t* codes,
                 uint16_t* scales, float* held);
  int (*encode_rows)(const float* x, ToEncode blocks, int count, int size, uint8_t* codes,
                     uint16_t* scales, float* held);
  void (*decode)(const uint8_t* codes, int skip, const uint16_t* scales, float factor, int size,
                 float* x);
};

struct Kernels {
  void (*second_moment[kDtypes])(const SecondMomentTile&);
  void (*instability8[kDtypes])(const InstabilityTile&);
  void (*instability4[kDtypes])(const InstabilityTile&);
  void (*instability2[kDtypes])(const InstabilityTile&);
  void (*instability32[kDtypes])(const InstabilityTile&);

  // The first pass of sweep C, from codes, decoded momentum or fp32: w and the new momentum, and of
  // blocks that are to be encoded what that needs. Index: gradient dtype.
  typedef void (*Momentum)(const StepConstants&, const Segment&, ToEncode blocks);
  Momentum momentum8[kDtypes], momentum4[kDtypes], momentum2[kDtypes];
  Momentum momentum_decoded[kDtypes], momentum32[kDtypes];
  Momentum momentum8_unfactored[kDtypes], momentum_decoded_unfactored[kDtypes],
      momentum32_unfactored[kDtypes];

  // Both that pass and the next, where gradient and parameter are fp32, factored, without the
  // cautious mask; of fp32 momentum w may be left out. Null where there are too few registers.
  Momentum update8, update32;

  // The update from them. Index: parameter dtype.
  void (*apply[kDtypes])(const StepConstants&, const Segment&);
  void (*apply_unfactored[kDtypes])(const StepConstants&, const Segment&);

  // Where a block decays. `steps` writes kDecayStep where the update is zero, else kNearestStep;
  // `forget` the new momentum, or zero there. Index: gradient dtype.
  void (*steps[kDtypes])(const Segment&, float* step);
  void (*forget[kDtypes])(const Segment&, float* kept);

  // How many elements the cautious mask keeps.
  int (*agreeing)(const float* w, const float* m, int size);

  CoarseCode code4, code2, code0;

  // Lane sum of at most kChunk values of g*g, and of u*u for a full second moment.
  float (*sum_g2[kDtypes])(const void* grad, int size);
  float (*sum_u2[kDtypes])(const StepConstants&, const void* grad, const float* exp_avg_sq,
                           int size);

  // 16 random bits for each of `size` <= kPiece elements from row-major index `element` on. Returns
  // where in `buffer`, which holds kPiece + kDraw values, the first one is.
  const uint16_t* (*random_bits)(const StepConstants&, uint64_t element, int size,
                                 uint16_t* buffer);

  // The three take at most kBlockSize values. `largest` is what `largest_magnitude` returns, and
  // step == nullptr rounds to nearest. `encode` returns the absmax of the block.
  float (*largest_magnitude)(const float* x, int size);
  float (*encode)(const float* x, const float* step, float largest, int size, int8_t* codes);
  void (*decode)(const int8_t* codes, float absmax, int size, float* x);
  // Encodes blocks of `size` values each, up to one that this way is not for; returns how many.
  int (*encode_rows)(const float* x, ToEncode blocks, int count, int size, int8_t* codes,
                     float* absmax);

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
