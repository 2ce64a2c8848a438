// Sweep B: sums of d*d, u*d and u*u.
#pragma once

#include "codec.h"
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

// MT is the stored momentum: int8_t or float. u and d of a block go through the first-level cache:
// in one pass they would not fit in registers, nor their operations where the processor lets them
// wait.
template <class G, class MT>
void instability(const InstabilityTile& shared) {
  const InstabilityTile tile = shared;
  const F kappa_0(tile.kappa_0);
  alignas(64) GroupBlock u, d;
  for (int i = 0; i < tile.rows; i += kGroup) {
    F row[3][kGroup];
    for (int s = 0; s < 3; ++s) {
      for (int q = 0; q < kGroup; ++q) row[s][q] = F(0.0f);
    }
    for (int block = 0; block < tile.cols; block += kBlockSize) {
      const int size = tile.cols - block < kBlockSize ? tile.cols - block : kBlockSize;
      for (int q = 0; q < kGroup; ++q) {
        const bool there = i + q < tile.rows;
        const G* g = there ? static_cast<const G*>(tile.grad) + (i + q) * tile.stride + block
                           : reinterpret_cast<const G*>(kZeros);
        const MT* stored =
            there ? static_cast<const MT*>(tile.momentum) + (i + q) * tile.momentum_stride + block
                  : reinterpret_cast<const MT*>(kZeros);
        const float* absmax = there && tile.absmax != nullptr
                                  ? tile.absmax + (i + q) * tile.absmax_stride + block / kBlockSize
                                  : kZeros;
        const F row_factor(there ? tile.row_factor[i + q] : 0.0f);
        with_momentum(stored, absmax, 1.0f, size, [&](auto momentum) CAME8BIT_LAMBDA {
          for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
            ask_for(g, j, 2 * kGroup * tile.stride);  // rows to come
            ask_for(stored, j, 2 * kGroup * tile.momentum_stride);
            const F col_factor = load_some(tile.col_factor + block + j, some);
            const F x = precondition(load_some(g + j, some), row_factor, col_factor);
            store(u[q] + j, x);
            store(d[q] + j, x * kappa_0 - momentum(j, some));
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
