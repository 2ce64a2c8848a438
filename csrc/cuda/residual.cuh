// Sweep B: row and column sums of d*d, u*d, u*u; then kappa, R, C and the factors of sweep C.
#pragma once

#include "codec.cuh"
#include "tile.cuh"

namespace came8bit {

// The stored momentum of `loads` rows of a thread; M is int8_t or float.
template <class M, bool fast, int loads>
struct MomentumRows;

template <int loads>
struct MomentumRows<int8_t, true, loads> {
  uint2 codes[loads];
  float absmax[loads];

  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int row) {
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      const int64_t r = tile.first_row + row + q * tile.streams;
      const bool there = row + q * tile.streams < tile.rows && tile.columns > 0;
      codes[q] = there ? __ldcg(reinterpret_cast<const uint2*>(
                             static_cast<const int8_t*>(p.exp_avg) + r * p.k + tile.column))
                       : make_uint2(0, 0);
      const int64_t block =
          p.whole_blocks
              ? r * p.grid.strips + tile.strip
              : tile.slice_block + (r * p.k + tile.column - tile.slice_first) / kBlockSize;
      absmax[q] = there ? __ldcg(p.absmax + block) : 0.0f;
    }
  }
  __device__ __forceinline__ void get(const Parameter&, const Tile&, int, int q, float* m) const {
    decode_vector(codes[q], absmax[q], m);
  }
};

template <int loads>
struct MomentumRows<float, true, loads> {
  float4 low[loads], high[loads];

  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int row) {
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      const int64_t r = tile.first_row + row + q * tile.streams;
      low[q] = high[q] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row + q * tile.streams < tile.rows && tile.columns > 0) {
        const float4* m = reinterpret_cast<const float4*>(static_cast<const float*>(p.exp_avg) +
                                                          r * p.k + tile.column);
        low[q] = __ldcg(m);
        high[q] = __ldcg(m + 1);
      }
    }
  }
  __device__ __forceinline__ void get(const Parameter&, const Tile&, int, int q, float* m) const {
    unpack_floats(low[q], high[q], m);
  }
};

// The scale of the block that element `e` belongs to.
__device__ __forceinline__ int64_t block_of(const Parameter& p, int64_t e) {
  const int64_t slice = e / p.slice_len;
  return slice * p.blocks_per_slice + (e - slice * p.slice_len) / kBlockSize;
}

// One element of the stored momentum times beta1, or (beta1 == 1) as it is.
static __device__ __noinline__ float load_momentum(const Parameter& p, int64_t e, float beta1,
                                                   int8_t*) {
  return decode_one(static_cast<const int8_t*>(p.exp_avg)[e], p.absmax[block_of(p, e)] * beta1);
}
__device__ __forceinline__ float load_momentum(const Parameter& p, int64_t e, float beta1, float*) {
  return static_cast<const float*>(p.exp_avg)[e] * beta1;
}

template <class M, int loads>
struct MomentumRows<M, false, loads> {
  __device__ __forceinline__ void load(const Parameter&, const Tile&, int) {}
  __device__ __forceinline__ void get(const Parameter& p, const Tile& tile, int row, int q,
                                      float* m) const {
    const int r = row + q * tile.streams;
    const int columns = r < tile.rows ? tile.columns : 0;
    const int64_t e = (tile.first_row + r) * p.k + tile.column;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      m[i] = i < columns ? load_momentum(p, e + i, 1.0f, static_cast<M*>(nullptr)) : 0.0f;
    }
  }
};

// One tile: sums into row_part, col_part, and that of u*u over the whole tile into tile_sum.
// `row_factor` holds kMaxSlabRows values.
template <class G, class M, bool fast>
__device__ __forceinline__ void residual_tile(const Parameter& p, const Settings& s, int64_t task,
                                              float* buffer, float* row_factors) {
  const Tile tile(p, task, p.grid.slab_rows, p.grid.slabs);
  const float sign = s.maximize ? -1.0f : 1.0f, root_mean_r = p.root_mean[tile.matrix];
  const float kappa_0 = p.scalars->kappa_0;
  __syncthreads();  // whoever used the factors before is done
  for (int r = static_cast<int>(threadIdx.x); r < tile.rows; r += kThreads) {
    row_factors[r] = row_factor(p.row_new[tile.first_row + r], root_mean_r, sign);
  }
  float column_factor[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    column_factor[i] = i < tile.columns ? p.col_factor[tile.matrix * p.k + tile.column + i] : 0.0f;
  }
  __syncthreads();
  const int64_t rows = p.b * p.n;
  float* row_part = p.row_part + tile.strip * rows + tile.first_row;
  const int64_t row_parts = p.grid.strips * rows;
  float column_sum[3][kVector] = {};
  for (int base = 0; base < tile.rows; base += kRowsAtOnce<G> * tile.streams) {
    const int row = base + tile.stream;
    GradientRows<G, fast> gradients;
    MomentumRows<M, fast, kRowsAtOnce<G>> momenta;
    gradients.load(p, tile, row);
    momenta.load(p, tile, row);
    float row_sum[3][kRowsAtOnce<G>];
#pragma unroll
    for (int q = 0; q < kRowsAtOnce<G>; ++q) {
      float g[kVector], m[kVector], d2[kVector], ud[kVector], u2[kVector];
      gradients.get(p, tile, row, q, g);
      momenta.get(p, tile, row, q, m);
      const int r = row + q * tile.streams;
      const float factor = r < tile.rows ? row_factors[r] : 0.0f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float u = precondition(g[i], factor, column_factor[i]);
        const float d = u * kappa_0 - m[i];
        d2[i] = d * d;
        ud[i] = u * d;
        u2[i] = u * u;
        column_sum[0][i] += d2[i];
        column_sum[1][i] += ud[i];
        column_sum[2][i] += u2[i];
      }
      row_sum[0][q] = sum_vector(d2);
      row_sum[1][q] = sum_vector(ud);
      row_sum[2][q] = sum_vector(u2);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      store_row_sums<kRowsAtOnce<G>>(tile, row, row_sum[i], row_part + i * row_parts);
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sum_streams(tile, column_sum[i], buffer);
    store_column_sums(p, tile, buffer, p.col_part + i * p.b * p.grid.slabs * p.k);
  }
  halve(buffer, tile.lanes * kVector, 1);
  if (threadIdx.x == 0) p.tile_sum[task] = buffer[0];
}

// Tasks as of second_moment_combine. Every block adds up the same sum of u*u to know kappa; then
// come R, C, and the factors of w; r and c are kept from here on.
__device__ __forceinline__ void residual_combine(const Parameter& p, const Settings& s,
                                                 int64_t task, float* buffer) {
  Scalars& scalars = *p.scalars;
  const float total_u2 = block_sum(p.tile_sum, p.tiles(), buffer);
  const bool finite = s.propagate || is_finite(total_u2);
  const float rms = root_mean(total_u2, static_cast<float>(p.numel()));
  const float kappa = clip_scale(rms, s.clip_threshold);
  if (task == 0 && threadIdx.x == 0) {
    scalars.u_finite = finite ? 1 : 0;
    scalars.rms = rms;
    scalars.kappa = kappa;
  }
  if (!finite) return;
  const int64_t row_tasks = p.b * p.row_chunks();
  const bool is_row = task < row_tasks;
  const int64_t chunk = is_row ? task : task - row_tasks;
  const int64_t chunks = is_row ? p.row_chunks() : p.col_chunks();
  const int64_t size = is_row ? p.n : p.k;
  const int64_t matrix = chunk / chunks, first = chunk % chunks * kWarp;
  float sum[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sum[i] = is_row ? sum_parts(p.row_part + i * p.grid.strips * p.b * p.n + matrix * p.n,
                                p.grid.strips, p.b * p.n, first, size, buffer)
                    : sum_parts(p.col_part + (i * p.b + matrix) * p.grid.slabs * p.k, p.grid.slabs,
                                p.k, first, size, buffer);
  }
  if (threadIdx.x >= kWarp) return;
  const int64_t i = first + threadIdx.x;
  float average = 0.0f;
  if (i < size) {
    const int64_t at = matrix * size + i;
    const float delta = kappa - scalars.kappa_0;
    const float mean =
        mean_instability(sum[0], sum[1], sum[2], delta * 2.0f, delta * delta,
                         static_cast<float>(is_row ? p.k : p.n), s.beta1_squared, s.eps2);
    float* averages = is_row ? p.res_row : p.res_col;
    average = ema(averages[at], s.beta3, mean, s.one_minus_beta3);
    averages[at] = average;
    if (is_row) {
      const float r = p.row_new[at];
      p.sq_row[at] = r;
      const float factor = row_factor(r, p.root_mean[matrix], s.maximize ? -1.0f : 1.0f);
      p.row_gain[at] = factor * gain(kappa, s.one_minus_beta1);
    } else {
      p.sq_col[at] = p.col_new[at];
      p.update_col[at] = column_factor(average, scalars.correction3);
    }
  }
  if (!is_row) return;
  const float chunk_sum = sum_lanes(average);
  if (threadIdx.x == 0) p.row_chunk[chunk] = chunk_sum;
}

// Tasks: 256 rows of a matrix. Writes the row factors of the update; task 0 also closes the books.
__device__ __forceinline__ void update_rows(const Parameter& p, const Settings& s, int64_t task,
                                            int64_t agreeing_tiles, float* buffer) {
  const Scalars& scalars = *p.scalars;
  const bool done = scalars.alive && scalars.u_finite;
  if (task == 0 && threadIdx.x == 0) {
    if (done) {
      ++*p.step;
      *p.rms_ratio = next_rms_ratio(scalars.rms, scalars.predicted_rms);
    } else {
      ++*p.skipped;
    }
  }
  if (!done) return;
  float scale = scalars.lr_scale;
  if (s.cautious) {
    const int64_t agreeing = block_count(p.agreeing, agreeing_tiles, buffer);
    scale = scale * cautious_scale(static_cast<float>(agreeing), static_cast<float>(p.numel()));
  }
  const int64_t tasks = (p.n + kThreads - 1) / kThreads;
  const int64_t matrix = task / tasks, row = task % tasks * kThreads + threadIdx.x;
  const float mean =
      warp_sum(p.row_chunk + matrix * p.row_chunks(), p.row_chunks()) / static_cast<float>(p.n);
  if (row >= p.n) return;
  const int64_t at = matrix * p.n + row;
  p.update_row[at] = row_factor(p.res_row[at], sqrt(mean), scale);
}

}  // namespace came8bit
