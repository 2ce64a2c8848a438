// A tile of a matrix: the rows of one slab in one strip of columns, and what a thread does in it.
#pragma once

#include "memory.cuh"
#include "reduce.cuh"

namespace came8bit {

// What a thread knows of its place. Rows count from the first of the tile, columns in the matrix.
struct Tile {
  int64_t matrix, slab, strip;
  int64_t first_row;  // in all rows of all matrices
  int rows;           // in the tile
  int lanes, lane;    // threads on a row, which one this is
  int streams, stream;
  int64_t column;                    // of the first of the kVector elements
  int columns;                       // how many of those there are: 0 ... kVector
  int64_t slice_first, slice_block;  // first element and first block of the 8-bit code of its slice

  __device__ __forceinline__ Tile(const Parameter& p, int64_t task, int64_t slab_rows,
                                  int64_t slabs) {
    const int64_t strips = p.grid.strips;
    strip = task % strips;
    slab = task / strips % slabs;
    matrix = task / strips / slabs;
    const int64_t left = p.n - slab * slab_rows;
    rows = static_cast<int>(left < slab_rows ? left : slab_rows);
    first_row = matrix * p.n + slab * slab_rows;
    lanes = p.grid.lanes;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    streams = p.grid.streams;
    stream = static_cast<int>(threadIdx.x) / lanes;
    column = strip * (int64_t{lanes} * kVector) + int64_t{lane} * kVector;
    const int64_t there = p.k - column;
    columns = static_cast<int>(there < 0 ? 0 : there < kVector ? there : kVector);
    slice_first = slice_block = 0;
    if (!p.whole_blocks) {  // then slices consist of matrices
      const int64_t slice = first_row * p.k / p.slice_len;
      slice_first = slice * p.slice_len;
      slice_block = slice * p.blocks_per_slice;
    }
  }
};

// Rows that a thread has under way at once: as many as registers allow. No sum depends on it.
template <class G>
constexpr int kRowsAtOnce = sizeof(Pack<G>) == 16 ? 4 : 2;

// The gradients of these rows, `streams` rows apart, zero where there are none.
template <class G, bool fast>
struct GradientRows {
  Pack<G> pack[kRowsAtOnce<G>];

  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int row) {
    if (!fast) return;
#pragma unroll
    for (int q = 0; q < kRowsAtOnce<G>; ++q) {
      const int r = row + q * tile.streams;
      pack[q] = r < tile.rows && tile.columns > 0
                    ? load_pack<G>(p.grad, (tile.first_row + r) * p.k + tile.column)
                    : Pack<G>{};
    }
  }
  __device__ __forceinline__ void get(const Parameter& p, const Tile& tile, int row, int q,
                                      float* g) const {
    if (fast) {
      unpack(p.grad, pack[q], g);
      return;
    }
    const int r = row + q * tile.streams;
    load_some(p.grad, (tile.first_row + r) * p.k + tile.column, r < tile.rows ? tile.columns : 0,
              g);
  }
};

// Writes the sums of `rows` rows to their places in `out`, which counts rows from the tile's first.
template <int rows>
__device__ __forceinline__ void store_row_sums(const Tile& tile, int row, const float* sums,
                                               float* out) {
  if (tile.lanes >= rows) {
    int which;
    const float sum = tile.lanes == kWarp
                          ? sum_lanes_of_rows<rows>(sums, Constant<kWarp>(), tile.lane, &which)
                          : sum_lanes_of_rows<rows>(sums, tile.lanes, tile.lane, &which);
    const int r = row + which * tile.streams;
    if ((tile.lane & (tile.lanes / rows - 1)) == 0 && r < tile.rows) out[r] = sum;
    return;
  }
#pragma unroll
  for (int q = 0; q < rows; ++q) {
    const float sum = sum_lanes(sums[q], tile.lanes);
    const int r = row + q * tile.streams;
    if (tile.lane == 0 && r < tile.rows) out[r] = sum;
  }
}

// Adds up what the streams of a block have for each column of the tile; buffer[c] is then the sum
// of column c of the strip. `buffer` holds kRoundVectors values.
__device__ __forceinline__ void sum_streams(const Tile& tile, const float* x, float* buffer) {
  __syncthreads();  // whoever used the buffer before is done
  const int width = tile.lanes * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    buffer[tile.stream * width + tile.lane * kVector + i] = x[i];
  }
  halve(buffer, kRoundVectors, width);
}

// Copies the column sums of the tile from `buffer` to parts of shape [b][slabs][k].
__device__ __forceinline__ void store_column_sums(const Parameter& p, const Tile& tile,
                                                  const float* buffer, float* parts) {
  const int width = tile.lanes * kVector;
  const int64_t first = tile.strip * width;
  float* out = parts + (tile.matrix * p.grid.slabs + tile.slab) * p.k;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads) {
    if (first + i < p.k) out[first + i] = buffer[i];
  }
}

}  // namespace came8bit
