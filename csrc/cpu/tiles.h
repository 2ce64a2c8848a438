// Sweeps A and B over tiles of a parameter: which rows and columns a task owns, and where its
// partial sums go. The grid depends on the shape alone, so the order of additions does, too.
#pragma once

#include <memory>

#include "step.h"

namespace came8bit {

// Slabs of rows times strips of kChunk columns, for each of b matrices.
struct CpuGrid {
  int64_t b, n, k, slab_rows, slabs, strips;

  explicit CpuGrid(const Parameter& p);
  int64_t tasks() const { return b * slabs * strips; }
};

// Work arrays of one parameter at a time; grown, never shrunk, during a call.
class Workspace {
 public:
  float *row_factor, *col_factor;  // [b][n], [b][k]
  float *row_new, *col_new;        // second moments before they are stored; then update factors
  float* row_sum[3];               // [b][n]
  float* col_sum[3];               // [b][k]
  float* row_part[3];              // [strips][b][n]; row_sum where there is one strip
  float* col_part[3];              // [slabs][b][k]; col_sum where there is one slab

  static int64_t floats(const CpuGrid& grid);
  void reserve(int64_t floats) {
    if (floats <= floats_) return;
    memory_.reset(
        new float[floats + kLanes]);  // not zeroed: every part is written before it is read
    floats_ = floats;
  }
  // With `kept`, all but the parts begin there and stay when the call is over.
  void lay_out(const CpuGrid& grid, float* kept = nullptr);
  // The beginning, on a cache line: vectors that straddle two lines cost twice.
  float* scratch() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t floats_ = 0;
};

// Sums of g*g into row_part[0], col_part[0].
void second_moment_task(const Parameter& p, const CpuGrid& grid, Workspace& w, int64_t task);

// Sums of d*d, u*d, u*u into row_part, col_part.
void instability_task(const Parameter& p, const CpuGrid& grid, Workspace& w, float kappa_0,
                      int64_t task);

// Adds the parts of sums 0..sums-1, in order, to row_sum and col_sum.
void add_parts(const CpuGrid& grid, Workspace& w, int sums);

}  // namespace came8bit
