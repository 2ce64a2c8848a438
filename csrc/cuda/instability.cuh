// Sweep B: row and column sums of d*d, u*d, u*u; then kappa, R, C and the factors of sweep C.
#pragma once

#include "coarse.cuh"
#include "tile.cuh"

namespace came8bit {

// The stored momentum of `loads` rows of a thread, as GradientRows; M is int8_t or float.
template <class M, bool fast, int loads>
struct MomentumRows;

template <int loads>
struct MomentumRows<int8_t, true, loads> {
  uint2 codes[loads];
  float absmax[loads];
  const int8_t* next;
  int64_t pitch;
  const float* scale;  // of the next row, where every row has blocks of its own
  int64_t scale_pitch;
  uint32_t byte_pattern;

  __device__ __forceinline__ MomentumRows(const Parameter& p, const Tile& tile)
      : next(p.exp_avg.as<const int8_t>() + (tile.first_row + tile.stream) * p.k + tile.column),
        pitch(int64_t{tile.streams} * p.k),
        scale(p.absmax + (tile.first_row + tile.stream) * p.grid.strips + tile.strip),
        scale_pitch(p.whole_blocks ? int64_t{tile.streams} * p.grid.strips : 0),
        byte_pattern(p.byte_pattern) {}
  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int row) {
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      const bool there = row + q * tile.streams < tile.rows && tile.columns > 0;
      if (scale_pitch == 0) {
        const int64_t e = next - p.exp_avg.as<const int8_t>();
        scale = p.absmax + (tile.slice_block + (e - tile.slice_first) / kBlockSize);
      }
      codes[q] = there ? __ldcg(reinterpret_cast<const uint2*>(next)) : make_uint2(0, 0);
      absmax[q] = there ? __ldcg(scale) : 0.0f;
      next += pitch;
      scale += scale_pitch;
    }
  }
  __device__ __forceinline__ void get(const Parameter&, const Tile&, int, int q, float* m) const {
    decode_vector(codes[q], absmax[q], byte_pattern, m);
  }
};

// Coarse codes, whose rows have blocks of their own.
template <class M, int loads>
struct MomentumRows<M, true, loads> {
  M stored[loads];
  const char* next;
  int64_t pitch;
  const uint16_t* scales;  // of the next row
  int64_t scale_pitch;

  __device__ __forceinline__ MomentumRows(const Parameter& p, const Tile& tile)
      : pitch(tile.streams * (p.k * kBits<M> / 8)), scale_pitch(tile.streams * row_scales<M>(p)) {
    const int64_t row = tile.first_row + tile.stream;
    next = p.exp_avg.as<const char>() + (row * p.k + tile.column) * kBits<M> / 8;
    scales = scales_of<M>(p, 0) + row * row_scales<M>(p) + column_scales<M>(tile.column);
  }
  __device__ __forceinline__ void load(const Parameter&, const Tile& tile, int row) {
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      stored[q] = {};
      if (row + q * tile.streams < tile.rows && tile.columns > 0) {
        load_vector(next, scales, &stored[q]);
      }
      next += pitch;
      scales += scale_pitch;
    }
  }
  __device__ __forceinline__ void get(const Parameter&, const Tile&, int, int q, float* m) const {
    decode_vector(stored[q], 1.0f, m);
  }
};

template <int loads>
struct MomentumRows<float, true, loads> {
  float4 low[loads], high[loads];
  const float* next;
  int64_t pitch;

  __device__ __forceinline__ MomentumRows(const Parameter& p, const Tile& tile)
      : next(p.exp_avg.as<const float>() + (tile.first_row + tile.stream) * p.k + tile.column),
        pitch(int64_t{tile.streams} * p.k) {}
  __device__ __forceinline__ void load(const Parameter&, const Tile& tile, int row) {
#pragma unroll
    for (int q = 0; q < loads; ++q) {
      low[q] = high[q] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row + q * tile.streams < tile.rows && tile.columns > 0) {
        low[q] = __ldcg(reinterpret_cast<const float4*>(next));
        high[q] = __ldcg(reinterpret_cast<const float4*>(next) + 1);
      }
      next += pitch;
    }
  }
  __device__ __forceinline__ void get(const Parameter&, const Tile&, int, int q, float* m) const {
    unpack_floats(low[q], high[q], m);
  }
};

// The stored momentum of `count` elements from `e` on, then zeros.
__device__ __forceinline__ void load_momenta(const Parameter& p, int64_t e, int count, float* m,
                                             int8_t*) {
  const int64_t slice = e / p.slice_len;
  int64_t at = e - slice * p.slice_len, first_block = slice * p.blocks_per_slice;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    m[i] = 0.0f;
    if (i >= count) continue;
    m[i] = decode_one(p.exp_avg.as<const int8_t>()[e + i], p.absmax[first_block + at / kBlockSize]);
    if (++at == p.slice_len) {
      at = 0;
      first_block += p.blocks_per_slice;
    }
  }
}
__device__ __forceinline__ void load_momenta(const Parameter& p, int64_t e, int count, float* m,
                                             float*) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    m[i] = i < count ? p.exp_avg.as<const float>()[e + i] : 0.0f;
  }
}

__device__ __forceinline__ void load_momenta(const Parameter&, int64_t, int, float* m, Bits0*) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) m[i] = 0.0f;
}

template <class M>
__device__ __forceinline__ void load_momenta(const Parameter& p, int64_t e, int count, float* m,
                                             M*) {
  constexpr int kPerByte = 8 / kBits<M>;
  int64_t slice = e / p.slice_len, at = e - slice * p.slice_len;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    m[i] = 0.0f;
    if (i >= count) continue;
    M stored = {};
    load_scales(scales_of<M>(p, slice * p.blocks_per_slice + at / kCoarseBlock), &stored);
    const uint32_t codes = *packed_codes<M>(p, slice, at);
    m[i] = decode_one(codes >> (at % kPerByte * kBits<M>)&((1u << kBits<M>)-1), stored, 1.0f);
    if (++at == p.slice_len) {
      at = 0;
      ++slice;
    }
  }
}

template <class M, int loads>
struct MomentumRows<M, false, loads> {
  __device__ __forceinline__ MomentumRows(const Parameter&, const Tile&) {}
  __device__ __forceinline__ void load(const Parameter&, const Tile&, int) {}
  __device__ __forceinline__ void get(const Parameter& p, const Tile& tile, int row, int q,
                                      float* m) const {
    const int r = row + q * tile.streams;
    const int columns = r < tile.rows ? tile.columns : 0;
    load_momenta(p, (tile.first_row + r) * p.k + tile.column, columns, m, static_cast<M*>(nullptr));
  }
};

// One tile: sums into row_part, col_part, and that of u*u over each strip into tile_sum.
// `row_factors` holds kMaxSlabRows values.
template <class G, class M, bool fast>
__device__ __forceinline__ void instability_tile(const Parameter& p, const StepSettings& s,
                                                 int64_t task, float* buffer, float* row_factors) {
  Tile tile = sweep_tile(p, task);
  const float sign = s.sign(), root_mean_r = p.root_mean[tile.matrix];
  const float kappa_0 = p.scalars->kappa_0;
  __syncthreads();  // the previous user of the factors is done
  for (int r = static_cast<int>(threadIdx.x); r < tile.rows; r += kThreads) {
    row_factors[r] = row_factor(p.row_new[tile.first_row + r], root_mean_r, sign);
  }
  __syncthreads();
  const int64_t rows = p.b * p.n;
  // Of fp16 gradients a generic pointer: ptxas spills for sm_120 with the other.
  float* row_part = p.row_part.pointer;
  if constexpr (!std::is_same<G, Half>::value) row_part = p.row_part;
  row_part += tile.part * rows + tile.first_row;
  const int64_t row_parts = p.grid.parts * rows;
  const int64_t first_strip = tile.strip, end = end_of_part(p, tile);
  for (int64_t strip = first_strip; strip < end; ++strip) {
    tile.move_to(p, strip);
    float column_factor[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      column_factor[i] =
          i < tile.columns ? p.col_factor[tile.matrix * p.k + tile.column + i] : 0.0f;
    }
    float column_sum[3][kVector] = {};
    GradientRows<G, fast> gradients(p, tile);
    MomentumRows<M, fast, kRowsAtOnce<G>> momenta(p, tile);
    for (int base = 0; base < tile.rows; base += kRowsAtOnce<G> * tile.streams) {
      const int row = base + tile.stream;
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
          const float d = difference(u, kappa_0, m[i]);
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
        store_row_sums<kRowsAtOnce<G>>(tile, row, row_sum[i], strip == first_strip,
                                       row_part + i * row_parts);
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      sum_streams(tile, column_sum[i], buffer);
      store_column_sums(p, tile, buffer, p.col_part + i * p.b * p.grid.slabs * p.k);
    }
    halve(buffer, tile.lanes * kVector, 1);
    if (threadIdx.x == 0) p.tile_sum[tile.index(p)] = buffer[0];
  }
}

// Every block adds up the same sums of u*u to know kappa, which it returns; one (`writes`) leaves
// it and what belongs to it in the scalars. False where the sum is not finite and that matters.
__device__ __forceinline__ bool find_kappa(const Parameter& p, const StepSettings& s, bool writes,
                                           float* buffer, float* kappa) {
  const float total_u2 = block_sum(p.tile_sum, p.tile_sums(), buffer);
  const bool finite = s.propagate || is_finite(total_u2);
  const float rms = root_mean(total_u2, static_cast<float>(p.numel()));
  *kappa = clip_scale(rms, s.clip_threshold);
  if (writes && threadIdx.x == 0) {
    Scalars& scalars = *p.scalars;
    scalars.u_finite = finite ? 1 : 0;
    scalars.rms = rms;
    scalars.kappa = *kappa;
  }
  return finite;
}

// From the sums over a row or column of `count` elements R or C, and the factors of w, of which
// factor(i) is that of row i of u; r and c are kept from here on.
template <class Factor>
__device__ __forceinline__ void instability_chunk(const Parameter& p, const StepSettings& s,
                                                  const Chunk& chunk, float d2, float ud, float u2,
                                                  float count, float kappa, const Factor& factor) {
  const bool is_row = chunk.is_row;
  float average = 0.0f;
  if (chunk.i < chunk.size) {
    const int64_t at = chunk.matrix * chunk.size + chunk.i;
    const float delta = kappa - p.scalars->kappa_0;
    const float mean =
        mean_instability(d2, ud, u2, delta * 2.0f, delta * delta, count, s.beta1_squared, s.eps2);
    float* averages = is_row ? p.res_row : p.res_col;
    average = ema(averages[at], s.beta3, mean, s.one_minus_beta3);
    averages[at] = average;
    if (is_row) {
      p.sq_row[at] = p.row_new[at];
      p.row_gain[at] = factor(at) * gain(kappa, s.one_minus_beta1);
    } else {
      p.sq_col[at] = p.col_new[at];
      p.update_col[at] = column_factor(average, p.scalars->correction3);
    }
  }
  if (!is_row) return;
  const float chunk_sum = sum_lanes(average);
  if (threadIdx.x % kWarp == 0) p.row_chunk[chunk.index] = chunk_sum;
}

// Tasks as of second_moment_combine.
__device__ __forceinline__ void instability_combine(const Parameter& p, const StepSettings& s,
                                                    int64_t task, float kappa) {
  const Chunk chunk(p, task);
  if (!chunk.there) return;
  const float d2 = chunk.sum(p, 0), ud = chunk.sum(p, 1), u2 = chunk.sum(p, 2);
  const float count = static_cast<float>(chunk.is_row ? p.k : p.n);
  instability_chunk(p, s, chunk, d2, ud, u2, count, kappa, [&](int64_t at) {
    return row_factor(p.row_new[at], p.root_mean[chunk.matrix], s.sign());
  });
}

// Tasks: 256 rows of a matrix. Writes the row factors of the update; task 0 also closes the books.
__device__ __forceinline__ void update_rows(const Parameter& p, const StepSettings& s, int64_t task,
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
  const float total = warp_sum(p.row_chunk + matrix * p.row_chunks(), p.row_chunks());
  if (row >= p.n) return;
  const int64_t at = matrix * p.n + row;
  p.update_row[at] = row_factor(p.res_row[at], root_mean(total, static_cast<float>(p.n)), scale);
}

}  // namespace came8bit
