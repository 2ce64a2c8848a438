// A tile of a matrix: the rows of one slab in a strip of columns, and what a thread does in it.
#pragma once

#include "reduce.cuh"
#include "vector_access.cuh"

namespace came8bit {

// What a thread knows of its place. Rows count from the first of the tile, columns in the matrix.
struct Tile {
  int64_t matrix, slab, part, strip;
  int64_t first_row;  // in all rows of all matrices
  int rows;           // in the tile
  int lanes, lane;    // threads on a row, which one this is
  int streams, stream;
  int64_t column;                    // of the first of the kVector elements
  int columns;                       // how many of those there are: 0 ... kVector
  int64_t slice_first, slice_block;  // first element and first block of the 8-bit code of its slice

  // Task `task` of slabs of `slab_rows` rows, each in `parts` parts of `span` strips. The first of
  // its strips.
  __device__ __forceinline__ Tile(const Parameter& p, int64_t task, int64_t slab_rows,
                                  int64_t slabs, int64_t parts, int span) {
    part = task % parts;
    slab = task / parts % slabs;
    matrix = task / parts / slabs;
    const int64_t left = p.n - slab * slab_rows;
    rows = static_cast<int>(left < slab_rows ? left : slab_rows);
    first_row = matrix * p.n + slab * slab_rows;
    lanes = p.grid.lanes;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    streams = p.grid.streams;
    stream = static_cast<int>(threadIdx.x) / lanes;
    move_to(p, part * span);
    slice_first = slice_block = 0;
    if (!p.whole_blocks) {  // then slices consist of matrices
      const int64_t slice = first_row * p.k / p.slice_len;
      slice_first = slice * p.slice_len;
      slice_block = slice * p.blocks_per_slice;
    }
  }
  // The same rows in another strip.
  __device__ __forceinline__ void move_to(const Parameter& p, int64_t new_strip) {
    strip = new_strip;
    column = strip * (int64_t{lanes} * kVector) + int64_t{lane} * kVector;
    const int64_t there = p.k - column;
    columns = static_cast<int>(there < 0 ? 0 : there < kVector ? there : kVector);
  }
  // Which of the sums of tiles that of this strip is.
  __device__ __forceinline__ int64_t index(const Parameter& p) const {
    return (matrix * p.grid.slabs + slab) * p.grid.strips + strip;
  }
};

// The tile of a task of sweeps A and B.
__device__ __forceinline__ Tile sweep_tile(const Parameter& p, int64_t task) {
  return {p, task, p.grid.slab_rows, p.grid.slabs, p.grid.parts, p.grid.span};
}
// The strip behind the last one of this part of a row.
__device__ __forceinline__ int64_t end_of_part(const Parameter& p, const Tile& tile) {
  const int64_t end = (tile.part + 1) * p.grid.span;
  return end < p.grid.strips ? end : p.grid.strips;
}

// Rows that a thread has under way at once: as many as registers allow. No sum depends on it.
template <class G>
constexpr int kRowsAtOnce = sizeof(Pack<G>) == 16 ? 4 : 2;

// The gradients of these rows, `streams` rows apart, zero where there are none. Every `load` takes
// the next ones.
template <class G, bool fast>
struct GradientRows {
  Pack<G> pack[kRowsAtOnce<G>];
  const char* next;
  int64_t pitch;

  __device__ __forceinline__ GradientRows(const Parameter& p, const Tile& tile)
      : next(bytes_at<G>(p.grad, (tile.first_row + tile.stream) * p.k + tile.column)),
        pitch(int64_t{tile.streams} * p.k * item_bytes<G>(p.grad)) {}
  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int row) {
    if (!fast) return;
#pragma unroll
    for (int q = 0; q < kRowsAtOnce<G>; ++q) {
      const bool there = row + q * tile.streams < tile.rows && tile.columns > 0;
      pack[q] = there ? load_pack<G>(p.grad, next) : Pack<G>{};
      next += pitch;
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

// Writes the sums of `rows` rows to their places in `out`, which counts rows from the tile's first,
// or adds them to what the same thread has written there (not `first`).
template <int rows>
__device__ __forceinline__ void store_row_sums(const Tile& tile, int row, const float* sums,
                                               bool first, float* out) {
  if (tile.lanes >= rows) {
    int which;
    const float sum = tile.lanes == kWarp
                          ? sum_lanes_of_rows<rows>(sums, Constant<kWarp>(), tile.lane, &which)
                          : sum_lanes_of_rows<rows>(sums, tile.lanes, tile.lane, &which);
    const int r = row + which * tile.streams;
    if ((tile.lane & (tile.lanes / rows - 1)) == 0 && r < tile.rows) {
      out[r] = first ? sum : out[r] + sum;
    }
    return;
  }
#pragma unroll
  for (int q = 0; q < rows; ++q) {
    const float sum = sum_lanes(sums[q], tile.lanes);
    const int r = row + q * tile.streams;
    if (tile.lane == 0 && r < tile.rows) out[r] = first ? sum : out[r] + sum;
  }
}

// Adds up what the streams of a block have for each column of the tile; buffer[c] is then the sum
// of column c of the strip. `buffer` holds kRoundVectors values.
__device__ __forceinline__ void sum_streams(const Tile& tile, const float* x, float* buffer) {
  __syncthreads();  // the previous user of the buffer is done
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

// A warp for each chunk of 32 rows of every matrix, then for chunks of 32 columns: 8 chunks a task.
struct Chunk {
  bool there, is_row;
  int64_t index;  // among those of rows, or of columns
  int64_t matrix;
  int64_t size;  // of the matrix: n or k
  int64_t i;     // row or column of this thread; it may be behind the last

  __device__ __forceinline__ Chunk(const Parameter& p, int64_t task) {
    const int64_t row_chunks = p.row_chunks(), col_chunks = p.col_chunks();
    index = task * kWarps + threadIdx.x / kWarp;
    is_row = index < p.b * row_chunks;
    if (!is_row) index -= p.b * row_chunks;
    there = is_row || index < p.b * col_chunks;
    const int64_t chunks = is_row ? row_chunks : col_chunks;
    size = is_row ? p.n : p.k;
    matrix = index / chunks;
    i = index % chunks * kWarp + threadIdx.x % kWarp;
  }
  // Sum `which` of the thread's row or column.
  __device__ __forceinline__ float sum(const Parameter& p, int which) const {
    if (i >= size) return 0.0f;
    const Global<const float> parts =
        is_row ? p.row_part + (which * p.grid.parts * p.b + matrix) * p.n
               : p.col_part + (which * p.b + matrix) * p.grid.slabs * p.k;
    return sum_parts(parts + i, is_row ? p.grid.parts : p.grid.slabs, is_row ? p.b * p.n : p.k);
  }
};

}  // namespace came8bit
