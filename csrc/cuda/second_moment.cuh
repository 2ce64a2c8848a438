// Sweep A: row and column sums of g*g; then r, c and what can be known of u before sweep B.
#pragma once

#include "tile.cuh"

namespace came8bit {

// One tile: sums into row_part[0], col_part[0].
template <class G, bool fast>
__device__ __forceinline__ void second_moment_tile(const Parameter& p, int64_t task,
                                                   float* buffer) {
  Tile tile = sweep_tile(p, task);
  float* row_part = p.row_part + tile.part * p.b * p.n + tile.first_row;
  const int64_t first_strip = tile.strip, end = end_of_part(p, tile);
  for (int64_t strip = first_strip; strip < end; ++strip) {
    tile.move_to(p, strip);
    float column_sum[kVector] = {};
    GradientRows<G, fast> rows(p, tile);
    // Every thread takes part in every round: the row sums need all lanes.
    for (int base = 0; base < tile.rows; base += kRowsAtOnce<G> * tile.streams) {
      const int row = base + tile.stream;
      rows.load(p, tile, row);
      float row_sum[kRowsAtOnce<G>];
#pragma unroll
      for (int q = 0; q < kRowsAtOnce<G>; ++q) {
        float g[kVector], square[kVector];
        rows.get(p, tile, row, q, g);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          square[i] = g[i] * g[i];
          column_sum[i] += square[i];
        }
        row_sum[q] = sum_vector(square);
      }
      store_row_sums<kRowsAtOnce<G>>(tile, row, row_sum, strip == first_strip, row_part);
    }
    sum_streams(tile, column_sum, buffer);
    store_column_sums(p, tile, buffer, p.col_part);
  }
}

// From the `sum` over a row or column of `count` elements r or c, the column factor of u, and what
// the chunk adds to the sums that `predict` needs.
__device__ __forceinline__ void second_moment_chunk(const Parameter& p, const StepSettings& s,
                                                    const Chunk& chunk, float sum, float count) {
  const bool is_row = chunk.is_row, leads = threadIdx.x % kWarp == 0;
  float fresh = 0.0f, ratio = 0.0f;
  if (chunk.i < chunk.size) {
    const int64_t at = chunk.matrix * chunk.size + chunk.i;
    const float mean = mean_square(sum, count, s.eps1);
    fresh = ema((is_row ? p.sq_row : p.sq_col)[at], s.beta2, mean, s.one_minus_beta2);
    (is_row ? p.row_new : p.col_new)[at] = fresh;
    if (!is_row) p.col_factor[at] = column_factor(fresh, p.scalars->correction2);
    ratio = sum / fresh;
  }
  const float chunk_ratio = sum_lanes(ratio);
  if (!is_row) {
    if (leads) p.col_chunk[chunk.index] = chunk_ratio;
    return;
  }
  const float chunk_sum = sum_lanes(sum), chunk_fresh = sum_lanes(fresh);
  if (leads) {
    const int64_t row_chunks = p.b * p.row_chunks();
    p.row_chunk[chunk.index] = chunk_sum;
    p.row_chunk[row_chunks + chunk.index] = chunk_fresh;
    p.row_chunk[2 * row_chunks + chunk.index] = chunk_ratio;
  }
}

// Adds the parts of rows and columns.
__device__ __forceinline__ void second_moment_combine(const Parameter& p, const StepSettings& s,
                                                      int64_t task) {
  const Chunk chunk(p, task);
  if (!chunk.there) return;
  const float count = static_cast<float>(chunk.is_row ? p.k : p.n);
  second_moment_chunk(p, s, chunk, chunk.sum(p, 0), count);
}

// Sums over a matrix: of g*g, of r, and of the row and column sums over r and c.
struct MatrixSums {
  float total, fresh, row_ratio, col_ratio;
};

// sqrt(mean(r)) of a matrix of `rows` rows; returns the sum of u*u that is expected of it.
__device__ __forceinline__ float predict(const Parameter& p, int64_t matrix, float rows,
                                         const MatrixSums& sums) {
  const float mean = sums.fresh / rows;
  p.root_mean[matrix] = sqrt(mean);
  return predicted_square(sums.row_ratio, sums.col_ratio, mean, p.scalars->correction2, sums.total);
}

// From the sum of u*u that is expected, kappa_0; `numel` of the full parameter.
__device__ __forceinline__ void expect(const Parameter& p, const StepSettings& s, float predicted,
                                       float numel) {
  Scalars& scalars = *p.scalars;
  scalars.predicted_rms = root_mean(predicted, numel);
  scalars.kappa_0 = clip_scale(*p.rms_ratio * scalars.predicted_rms, s.clip_threshold);
}

// One block: sqrt(mean(r)) of each matrix; thread 0 gets the sum of g*g and that of u*u that is
// expected.
struct Totals {
  float total, predicted;
};
__device__ __forceinline__ Totals sum_matrices(const Parameter& p) {
  const int64_t row_chunks = p.row_chunks(), col_chunks = p.col_chunks();
  for (int64_t i = threadIdx.x / kWarp; i < p.b; i += kWarps) {
    const float* rows = p.row_chunk + i * row_chunks;
    const float total = warp_sum(rows, row_chunks);
    const float fresh = warp_sum(rows + p.b * row_chunks, row_chunks);
    const float row_ratio = warp_sum(rows + 2 * p.b * row_chunks, row_chunks);
    const float col_ratio = warp_sum(p.col_chunk + i * col_chunks, col_chunks);
    if (threadIdx.x % kWarp == 0) {
      p.total[i] = total;
      p.predicted[i] = predict(p, i, static_cast<float>(p.n), {total, fresh, row_ratio, col_ratio});
    }
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return {};
  return {warp_sum(p.total, p.b), warp_sum(p.predicted, p.b)};
}

// One block: the RMS that u is expected to have, whether the gradient is finite.
__device__ __forceinline__ void second_moment_scalars(const Parameter& p, const StepSettings& s) {
  const Totals totals = sum_matrices(p);
  if (threadIdx.x != 0) return;
  if (p.grad_square.pointer != nullptr) *p.grad_square = totals.total;
  p.scalars->alive = s.propagate || is_finite(totals.total) ? 1 : 0;
  expect(p, s, totals.predicted, static_cast<float>(p.numel()));
}

}  // namespace came8bit
