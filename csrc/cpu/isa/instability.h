// Sweep B: sums of d*d, u*d and u*u.
#pragma once

#include "codec.h"
#include "second_moment.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

CAME8BIT_INLINE F load_momentum(const float* m, int size, F) {
  return load_some(m, size);
}
CAME8BIT_INLINE F load_momentum(const int8_t* codes, int size, F absmax) {
  return decode_lanes(load_some(codes, size), absmax);
}

// MT is the stored momentum: int8_t or float.
template <class G, class MT>
void instability(const InstabilityTile& shared) {
  const InstabilityTile tile = shared;
  const F kappa_0(tile.kappa_0);
  for (int i = 0; i < tile.rows; i += kGroup) {
    const G* g[kGroup];
    const MT* m[kGroup];
    const float* absmax[kGroup];
    F factor[kGroup], row[3][kGroup];
    for (int q = 0; q < kGroup; ++q) {
      const bool there = i + q < tile.rows;
      g[q] = there ? static_cast<const G*>(tile.grad) + (i + q) * tile.stride
                   : reinterpret_cast<const G*>(kZeros);
      m[q] = there ? static_cast<const MT*>(tile.momentum) + (i + q) * tile.momentum_stride
                   : reinterpret_cast<const MT*>(kZeros);
      absmax[q] = there && tile.absmax ? tile.absmax + (i + q) * tile.absmax_stride : kZeros;
      factor[q] = F(there ? tile.row_factor[i + q] : 0.0f);
      for (int s = 0; s < 3; ++s) row[s][q] = F(0.0f);
    }
    for (int block = 0; block < tile.cols; block += kBlockSize) {
      const int end = tile.cols - block < kBlockSize ? tile.cols : block + kBlockSize;
      F scale[kGroup];
      for (int q = 0; q < kGroup; ++q) scale[q] = F(absmax[q][block / kBlockSize]);
      const auto column = [&](int j, int size) CAME8BIT_LAMBDA {
        const F col_factor = load_some(tile.col_factor + j, size);
        F d2[kGroup], ud[kGroup], u2[kGroup];
        for (int q = 0; q < kGroup; ++q) {
          prefetch_far(g[q] + 2 * kGroup * tile.stride + j);  // rows to come
          if (j % kLine == 0) prefetch_far(m[q] + 2 * kGroup * tile.momentum_stride + j);
          const F u = precondition(load_some(g[q] + j, size), factor[q], col_factor);
          const F d = u * kappa_0 - load_momentum(m[q] + j, size, scale[q]);
          d2[q] = d * d;
          ud[q] = u * d;
          u2[q] = u * u;
          row[0][q] = row[0][q] + d2[q];
          row[1][q] = row[1][q] + ud[q];
          row[2][q] = row[2][q] + u2[q];
        }
        const F sum[3] = {(d2[0] + d2[1]) + (d2[2] + d2[3]), (ud[0] + ud[1]) + (ud[2] + ud[3]),
                          (u2[0] + u2[1]) + (u2[2] + u2[3])};
        for (int s = 0; s < 3; ++s) {
          float* out = tile.col_sum[s] + j;
          store_some(out, load_some(out, size) + sum[s], size);
        }
      };
      int j = block;
      for (; j + kLanes <= end; j += kLanes) column(j, kLanes);
      if (j < end) column(j, end - j);
    }
    for (int q = 0; q < kGroup && i + q < tile.rows; ++q) {
      for (int s = 0; s < 3; ++s) tile.row_sum[s][i + q] = sum_lanes(row[s][q]);
    }
  }
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
