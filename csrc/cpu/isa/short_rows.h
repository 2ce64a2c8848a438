// Rows of 8 or 16 elements that follow each other in memory, as LoRA has them: 64 elements
// together.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

constexpr int kVectors = 64 / kLanes;

CAME8BIT_INLINE F add_lanes(F x, F y) {
  return x + y;
}
CAME8BIT_INLINE F larger_lanes(F x, F y) {
  return larger(x, y);
}

template <int cols>
struct ShortRows {
  static constexpr int kRows = 64 / cols;

  // The values of the rows, or of the columns, in the lanes of one of the vectors.
  static CAME8BIT_INLINE F of_rows(const float* row, int vector) {
    return cols == 8 ? of_two_rows(row + 2 * vector) : F(row[vector]);
  }
  static CAME8BIT_INLINE F of_columns(const float* col) {
    return cols == 8 ? twice(col) : load(col);
  }

  // op over the lanes of each row, as sum_lanes and largest_lane.
  template <class Op>
  static CAME8BIT_INLINE void over_rows(const F* x, Op op, float* out) {
    if (cols == 8) {
      over_eights(x[0], x[1], op, out);
      over_eights(x[2], x[3], op, out + 4);
    } else {
      over_eights(op(lower_halves(x[0], x[1]), upper_halves(x[0], x[1])),
                  op(lower_halves(x[2], x[3]), upper_halves(x[2], x[3])), op, out);
    }
  }

  // Adds groups of four rows to the sums of columns.
  static CAME8BIT_INLINE void add_columns(const F* x, float* col_sum) {
    if (cols == 8) {
      for (int i = 0; i < 4; i += 2) {
        const F pairs = lower_halves(x[i], x[i + 1]) + upper_halves(x[i], x[i + 1]);
        const F sum = lower_halves(pairs, pairs) + upper_halves(pairs, pairs);
        store_some(col_sum, load_some(col_sum, cols) + sum, cols);
      }
    } else {
      store(col_sum, load(col_sum) + ((x[0] + x[1]) + (x[2] + x[3])));
    }
  }
};

// run(cols), where cols() is `size` as a constant; 0 where rows of that size do not go together.
template <class Run>
CAME8BIT_INLINE int for_short_rows(int size, Run run) {
  if (size == 8) return run(std::integral_constant<int, 8>());
  if (size == 16) return run(std::integral_constant<int, 16>());
  return 0;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
