// Sweep C over blocks of at most 256 values of one slice (coarse codes: 128), and the codec by
// itself.
#pragma once

#include "step.h"

namespace came8bit {

constexpr int64_t kBlocksPerTask = 64;

// The blocks of a parameter in row-major order. With fp32 momentum a block is a piece of a row.
struct Blocks {
  int64_t slices, slice_len, size, per_slice;

  Blocks(int64_t slices, int64_t slice_len, int64_t size)
      : slices(slices),
        slice_len(slice_len),
        size(size),
        per_slice((slice_len + size - 1) / size) {}
  explicit Blocks(const Parameter& p)
      : Blocks(coded(p) ? p.slices : p.b * p.n, coded(p) ? p.slice_len : p.k,
               p.coarse() ? kCoarseBlock : kBlockSize) {}

  static bool coded(const Parameter& p) { return p.bits < 32; }

  int64_t count() const { return slices * per_slice; }
  int64_t tasks() const { return (count() + kBlocksPerTask - 1) / kBlocksPerTask; }
};

// Factors that u and the update are made with; null for a full second moment.
struct Factors {
  const float *row_gain, *col;           // [b][n], [b][k]; row factor times gain
  const float *update_row, *update_col;  //
};

// Applies the blocks of one task to the parameter and stores the momentum.
void apply_blocks(const Parameter& p, const StepConstants& constants, const Factors& factors,
                  int64_t task);

// How many elements of the task's blocks the cautious mask keeps.
int64_t count_agreeing(const Parameter& p, const StepConstants& constants, const Factors& factors,
                       int64_t task);

}  // namespace came8bit
