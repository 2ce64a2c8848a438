// Sweeps A and B: sums over rows and columns of a tile. Included once per instruction set.
#pragma once

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// `size` < 16 values, the other lanes zero.
template <class T>
CAME8BIT_INLINE auto load_part(const T* p, int size) -> decltype(load(p)) {
  T lanes[kLanes];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, static_cast<size_t>(size) * sizeof(T));
  return load(lanes);
}

template <class T>
CAME8BIT_INLINE auto load_some(const T* p, int size) -> decltype(load(p)) {
  return size >= kLanes ? load(p) : load_part(p, size);
}

template <class T, class V>
CAME8BIT_INLINE void store_some(T* p, V value, int size) {
  if (size >= kLanes) {
    store(p, value);
    return;
  }
  T lanes[kLanes];
  store(lanes, value);
  memcpy(p, lanes, static_cast<size_t>(size) * sizeof(T));
}

CAME8BIT_INLINE F decode_lanes(I code, F absmax) {
  const F value = decode(to_float(code), absmax);
  return select(code == I(kNanCode), F(NAN), value);
}

// Stands in for the rows that a last group of fewer than four lacks.
alignas(64) const float kZeros[kChunk] = {};

constexpr int kLine = 64;  // elements of 8-bit momentum in a cache line

template <class G>
void second_moment(const SecondMomentTile& shared) {
  const SecondMomentTile tile = shared;  // a copy of its own: the stores below cannot alias it
  for (int i = 0; i < tile.rows; i += kGroup) {
    const G* g[kGroup];
    for (int q = 0; q < kGroup; ++q) {
      g[q] = i + q < tile.rows ? static_cast<const G*>(tile.grad) + (i + q) * tile.stride
                               : reinterpret_cast<const G*>(kZeros);
    }
    F row[kGroup] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    const auto column = [&](int j, int size) CAME8BIT_LAMBDA {
      F square[kGroup];
      for (int q = 0; q < kGroup; ++q) {
        prefetch_far(g[q] + 3 * kGroup * tile.stride + j);  // rows to come
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

CAME8BIT_INLINE F load_momentum(const float* m, int size, F) {
  return load_some(m, size);
}
CAME8BIT_INLINE F load_momentum(const int8_t* codes, int size, F absmax) {
  return decode_lanes(load_some(codes, size), absmax);
}

// MT is the stored momentum: int8_t or float.
template <class G, class MT>
void residual(const ResidualTile& shared) {
  const ResidualTile tile = shared;
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
