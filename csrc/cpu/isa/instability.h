// Sweep B: sums of d*d, u*d and u*u.
#pragma once

#include "packed.h"
#include "second_moment.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Four rows of a block.
typedef float GroupBlock[kGroup][kBlockSize];

// Adds x*y to the sums of four rows and, in pairs of rows, to those of columns.
CAME8BIT_INLINE void add_products(const GroupBlock& x, const GroupBlock& y, int size, F* row_sum,
                                  float* col_sum) {
  F row[kGroup] = {row_sum[0], row_sum[1], row_sum[2], row_sum[3]};
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    F product[kGroup];
    for (int q = 0; q < kGroup; ++q) {
      product[q] = load(x[q] + j) * load(y[q] + j);
      row[q] = row[q] + product[q];
    }
    const F sum = (product[0] + product[1]) + (product[2] + product[3]);
    store_some(col_sum + j, load_some(col_sum + j, some) + sum, some);
  });
  for (int q = 0; q < kGroup; ++q) row_sum[q] = row[q];
}

// Takes short rows from row i on, up to codes of which one is NaN; returns the first row that is
// left.
template <int cols, class G, class MT>
int instability_of_short_rows(const InstabilityTile& tile, int i) {
  typedef ShortRows<cols> Rows;
  const F kappa_0(tile.kappa_0), col_factor = Rows::of_columns(tile.col_factor);
  for (; i + Rows::kRows <= tile.rows; i += Rows::kRows) {
    const G* g = static_cast<const G*>(tile.grad) + i * cols;
    const MT* stored = row_of<MT>(tile.momentum, i, tile.momentum_stride);
    if (has_nan(stored, 64)) return i;
    F d2[kVectors], ud[kVectors], u2[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int j = v * kLanes;
      ask_for(g, j, kAhead);
      ask_for(stored, j, kAhead);
      const F u = precondition(load(g + j), Rows::of_rows(tile.row_factor + i, v), col_factor);
      const F m = momentum_of_rows<cols>(stored, scales_from<MT>(tile.scales, i), F(1.0f), v);
      const F d = difference(u, kappa_0, m);
      d2[v] = d * d;
      ud[v] = u * d;
      u2[v] = u * u;
    }
    sum_short_rows<cols>(d2, tile.row_sum[0] + i, tile.col_sum[0]);
    sum_short_rows<cols>(ud, tile.row_sum[1] + i, tile.col_sum[1]);
    sum_short_rows<cols>(u2, tile.row_sum[2] + i, tile.col_sum[2]);
  }
  return i;
}

// MT is the stored momentum: int8_t, Packed or float. u and d of a block go through the first-level
// cache: in one pass they would not fit in registers, nor their operations where the processor lets
// them wait.
template <class G, class MT>
void instability(const InstabilityTile& shared) {
  const InstabilityTile tile = shared;
  const F kappa_0(tile.kappa_0);
  alignas(64) GroupBlock u, d;
  const bool one_after_the_other =
      tile.stride == tile.cols && tile.momentum_stride == bytes_of<MT>(tile.cols);
  for (int i = 0; i < tile.rows; i += kGroup) {
    if (one_after_the_other) {
      if (tile.cols == 8) i = instability_of_short_rows<8, G, MT>(tile, i);
      if (tile.cols == 16) i = instability_of_short_rows<16, G, MT>(tile, i);
      if (i == tile.rows) return;
    }
    F row[3][kGroup];
    for (int s = 0; s < 3; ++s) {
      for (int q = 0; q < kGroup; ++q) row[s][q] = F(0.0f);
    }
    for (int block = 0; block < tile.cols; block += kBlockOf<MT>) {
      const int size = tile.cols - block < kBlockOf<MT> ? tile.cols - block : kBlockOf<MT>;
      for (int q = 0; q < kGroup; ++q) {
        const bool there = i + q < tile.rows;
        const G* g = there ? static_cast<const G*>(tile.grad) + (i + q) * tile.stride + block
                           : reinterpret_cast<const G*>(kZeros);
        const MT* stored =
            there ? advance(row_of<MT>(tile.momentum, i + q, tile.momentum_stride), block)
                  : reinterpret_cast<const MT*>(kZeros);
        const MT* to_come = row_of<MT>(stored, 2 * kGroup, tile.momentum_stride);
        const auto* scales =
            there && tile.scales != nullptr
                ? scales_from<MT>(tile.scales, block / kBlockOf<MT>, (i + q) * tile.scales_stride)
                : scales_from<MT>(kZeros, 0);
        const F row_factor(there ? tile.row_factor[i + q] : 0.0f);
        with_momentum(stored, scales, 1.0f, size, [&](auto momentum) CAME8BIT_LAMBDA {
          for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
            ask_for(g, j, 2 * kGroup * tile.stride);  // rows to come
            ask_for(to_come, j, 0);
            const F col_factor = load_some(tile.col_factor + block + j, some);
            const F x = precondition(load_some(g + j, some), row_factor, col_factor);
            store(u[q] + j, x);
            store(d[q] + j, difference(x, kappa_0, momentum(j, some)));
          });
        });
      }
      add_products(d, d, size, row[0], tile.col_sum[0] + block);
      add_products(u, d, size, row[1], tile.col_sum[1] + block);
      add_products(u, u, size, row[2], tile.col_sum[2] + block);
    }
    for (int q = 0; q < kGroup && i + q < tile.rows; ++q) {
      for (int s = 0; s < 3; ++s) tile.row_sum[s][i + q] = sum_lanes(row[s][q]);
    }
  }
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
