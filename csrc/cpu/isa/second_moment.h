// Sweep A: sums of g*g.
#pragma once

#include "short_rows.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Stands in for the rows that a last group of fewer than four lacks.
alignas(64) const float kZeros[kChunk] = {};

// Writes the sums of rows, and adds to those of columns.
template <int cols>
CAME8BIT_INLINE void sum_short_rows(const F* x, float* row_sum, float* col_sum) {
  ShortRows<cols>::over_rows(x, add_lanes, row_sum);
  ShortRows<cols>::add_columns(x, col_sum);
}

// Takes short rows from row i on; returns the first row that is left.
template <int cols, class G>
int second_moment_of_short_rows(const SecondMomentTile& tile, int i) {
  for (; i + ShortRows<cols>::kRows <= tile.rows; i += ShortRows<cols>::kRows) {
    const G* g = static_cast<const G*>(tile.grad) + i * cols;
    F square[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      ask_for(g, v * kLanes, kAhead);
      const F x = load(g + v * kLanes);
      square[v] = x * x;
    }
    sum_short_rows<cols>(square, tile.row_sum + i, tile.col_sum);
  }
  return i;
}

template <class G>
void second_moment(const SecondMomentTile& shared) {
  const SecondMomentTile tile = shared;  // a copy of its own: the stores below cannot alias it
  int i = 0;
  if (tile.stride == tile.cols) {
    if (tile.cols == 8) i = second_moment_of_short_rows<8, G>(tile, i);
    if (tile.cols == 16) i = second_moment_of_short_rows<16, G>(tile, i);
  }
  for (; i < tile.rows; i += kGroup) {
    const G* g[kGroup];
    for (int q = 0; q < kGroup; ++q) {
      g[q] = i + q < tile.rows ? static_cast<const G*>(tile.grad) + (i + q) * tile.stride
                               : reinterpret_cast<const G*>(kZeros);
    }
    F row[kGroup] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    const auto column = [&](int j, int size) CAME8BIT_LAMBDA {
      F square[kGroup];
      for (int q = 0; q < kGroup; ++q) {
        ask_for(g[q], j, 3 * kGroup * tile.stride);  // rows to come
        const F x = load_some(g[q] + j, size);
        square[q] = x * x;
        row[q] = row[q] + square[q];
      }
      const F sum = (square[0] + square[1]) + (square[2] + square[3]);
      store_some(tile.col_sum + j, load_some(tile.col_sum + j, size) + sum, size);
    };
    int j = 0;
    for (; j + kLanes <= tile.cols; j += kLanes) column(j, kLanes);
    if (j < tile.cols) column(j, tile.cols - j);
    for (int q = 0; q < kGroup && i + q < tile.rows; ++q) tile.row_sum[i + q] = sum_lanes(row[q]);
  }
}

template <class G>
float sum_g2(const void* grad, int size) {
  const G* g = static_cast<const G*>(grad);
  return chunked_sum(size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F x = load_some(g + j, some);
    return x * x;
  });
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
