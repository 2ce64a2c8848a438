// Sweep C of a factored parameter: momentum, update, rounding, and the codes.
#pragma once

#include "instability.cuh"
#include "second_moment.cuh"

namespace came8bit {

// What eight elements of a row need; `decayed` is beta1 times the stored momentum.
__device__ __forceinline__ void new_momentum(const float* g, const float* decayed, float row_gain,
                                             const float* column_factor, float* w, float* m) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    w[i] = precondition(g[i], row_gain, column_factor[i]);
    m[i] = momentum(decayed[i], w[i]);
  }
}

// `held` is what the code remembers of m: the rest acts now. Only coarse codes have it.
template <class M>
__device__ __forceinline__ float direction(float m, float w, const StepSettings& s, float held,
                                           float spent) {
  const float ahead = look_ahead(m, w, s.beta1);  // a branch would take more registers
  const float of_rule = s.nesterov ? ahead : m;
  return kCoarse<M> ? spend(of_rule, m, held, spent) : of_rule;
}

__device__ __forceinline__ float updated(float p, float m, float w, float update, float shrink,
                                         bool cautious) {
  if (cautious && !agrees(m, w)) update = 0.0f;
  return decay_and_apply(p, shrink, update);
}
// The same for eight neighbours, `p` changed in place; one branch for all of them.
template <class M>
__device__ __forceinline__ void update_vector(float* p, const float* m, const float* w,
                                              const float* held, float spent, float row,
                                              const float* column, float shrink,
                                              const StepSettings& s) {
  float update[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    update[i] = precondition(direction<M>(m[i], w[i], s, held[i], spent), row, column[i]);
  }
  if (s.cautious) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) update[i] = agrees(m[i], w[i]) ? update[i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) p[i] = decay_and_apply(p[i], shrink, update[i]);
}

CAME8BIT_INLINE int64_t apply_tasks(const Parameter& p, Access access) {
  if (access == kTiles) return p.b * ((p.n + p.apply_rows() - 1) / p.apply_rows()) * p.grid.strips;
  const int64_t blocks = p.slices * p.blocks_per_slice;
  return (blocks + p.blocks_at_once() - 1) / p.blocks_at_once();
}

// The stored momentum of eight elements, on its way. `scale` is null for fp32 momentum.
struct MomentumVector8 {
  uint2 codes;
  float absmax;
  __device__ __forceinline__ void load(const char* exp_avg, const float* scale) {
    codes = __ldcg(reinterpret_cast<const uint2*>(exp_avg));
    absmax = __ldcg(scale);
  }
  // beta1 times it.
  __device__ __forceinline__ void decayed(float beta1, uint32_t byte_pattern, float* m) const {
    decode_vector(codes, absmax * beta1, byte_pattern, m);
  }
};
struct MomentumVector32 {
  float4 low, high;
  __device__ __forceinline__ void load(const char* exp_avg, const float*) {
    const float4* m = reinterpret_cast<const float4*>(exp_avg);
    low = __ldcg(m);
    high = __ldcg(m + 1);
  }
  __device__ __forceinline__ void decayed(float beta1, uint32_t, float* m) const {
    unpack_floats(low, high, m);
#pragma unroll
    for (int i = 0; i < kVector; ++i) m[i] = m[i] * beta1;
  }
};
template <class M>
struct MomentumVectorCoarse {
  M stored;
  __device__ __forceinline__ void load(const char* exp_avg, const uint16_t* scales) {
    load_vector(exp_avg, scales, &stored);
  }
  __device__ __forceinline__ void decayed(float beta1, uint32_t, float* m) const {
    decode_vector(stored, beta1, m);
  }
};
template <class M>
struct MomentumVectorOf {
  using type = MomentumVectorCoarse<M>;
};
template <>
struct MomentumVectorOf<float> {
  using type = MomentumVector32;
};
template <>
struct MomentumVectorOf<int8_t> {
  using type = MomentumVector8;
};

// A tile of rows whose blocks of the code end where the rows do. With `count_only` the tile
// only counts the elements that the cautious mask keeps.
template <class P, class G, class M, bool count_only>
__device__ __forceinline__ int apply_tile(const Parameter& p, const StepSettings& s, int64_t task) {
  constexpr bool is8bit = sizeof(M) == 1;
  const int64_t slabs = (p.n + p.apply_rows() - 1) / p.apply_rows();
  const Tile tile(p, task, p.apply_rows(), slabs, p.grid.strips, 1);
  // In registers: the compiler cannot know that the stores below leave `p` alone.
  const Strided grad_tensor = p.grad, param_tensor = p.param;
  const uint32_t index = p.index, step = p.scalars->step, byte_pattern = p.byte_pattern;
  const float shrink = p.scalars->shrink, spent = kCoarse<M> ? p.scalars->spent : 0.0f;
  const bool stochastic = s.stochastic;
  const bool draws = stochastic && param_tensor.dtype != kFloat32;
  const bool inside = tile.columns > 0;
  float column_factor[kVector], update_column[kVector];
  const int64_t first_column = tile.matrix * p.k + tile.column;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    column_factor[i] = inside ? p.col_factor[first_column + i] : 0.0f;
    update_column[i] = inside && !count_only ? p.update_col[first_column + i] : 0.0f;
  }
  // Where the next row is, stepping down by `streams` rows.
  const int64_t row = tile.first_row + tile.stream, e = row * p.k + tile.column;
  const int64_t pitch = int64_t{tile.streams} * p.k;
  const int64_t row_pitch = kCoarse<M> ? row_scales<M>(p) : is8bit ? p.grid.strips : 0;
  const int64_t scale_pitch = tile.streams * row_pitch;
  const char* grad = bytes_at<G>(grad_tensor, e);
  const int64_t grad_pitch = pitch * item_bytes<G>(grad_tensor);
  char* param = bytes_at<P>(param_tensor, e);
  const int64_t param_pitch = pitch * item_bytes<P>(param_tensor);
  char* exp_avg = p.exp_avg.as<char>() + e * kBits<M> / 8;
  const int64_t exp_avg_pitch = pitch * kBits<M> / 8;
  auto* scale = scales_of<M>(p, 0);
  if (kBits<M> <= 8) scale += row * row_pitch;
  if (kBits<M> <= 8) scale += kCoarse<M> ? column_scales<M>(tile.column) : tile.strip;
  const float* gain = p.row_gain + row;
  const float* update = p.update_row + row;
  uint64_t element = p.offset + static_cast<uint64_t>(e);

  // What is read of one row; the next row's is on its way while this one's is worked on.
  struct Row {
    Pack<G> grad;
    Pack<P> param;
    typename MomentumVectorOf<M>::type momenta;
    float gain, update;
  };
  const auto load_row = [&](bool there) {
    Row r = {};
    if (there) {
      r.grad = load_pack<G>(grad_tensor, grad);
      if (!count_only) r.param = load_pack<P>(param_tensor, param);
      r.momenta.load(exp_avg, scale);
      r.gain = __ldcg(gain);
      if (!count_only) r.update = __ldcg(update);
    }
    return r;
  };
  int agreeing = 0;
  bool next_there = inside && tile.stream < tile.rows;
  Row next = load_row(next_there);
  // Every thread takes part in every round: the largest value of a block needs all lanes.
#pragma unroll(sizeof(Pack<P>) == 16 ? 2 : 1)
  for (int base = 0; base < tile.rows; base += tile.streams) {
    const Row now = next;
    const bool there = next_there;
    char *const param_now = param, *const exp_avg_now = exp_avg;
    auto* const scale_now = scale;
    grad += grad_pitch;
    param += param_pitch;
    exp_avg += exp_avg_pitch;
    scale += scale_pitch;
    gain += tile.streams;
    update += tile.streams;
    next_there = inside && base + tile.streams + tile.stream < tile.rows;
    next = load_row(next_there);
    float g[kVector], decayed[kVector], w[kVector], m[kVector];
    unpack(grad_tensor, now.grad, g);
    now.momenta.decayed(s.beta1, byte_pattern, decayed);
    new_momentum(g, decayed, now.gain, column_factor, w, m);
    if (count_only) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) agreeing += there && agrees(m[i], w[i]) ? 1 : 0;
      continue;
    }
    float x[kVector];
    float held[kVector] = {};
    if constexpr (kCoarse<M>) {
      const int64_t left = p.k - tile.column / kCoarseBlock * kCoarseBlock;
      keep(m, w, held);
      const M stored = encode_block(
          held, there ? kVector : 0, static_cast<int>(left < kCoarseBlock ? left : kCoarseBlock),
          tile.lanes < kCoarseLanes ? tile.lanes : kCoarseLanes, static_cast<M*>(nullptr));
      decode_vector(stored, 1.0f, held);
      __syncwarp();  // all lanes have read the old scales before one writes the new
      if (there) {
        if constexpr (kBits<M> > 0) {
          __stcg(reinterpret_cast<decltype(stored.codes)*>(exp_avg_now), stored.codes);
        }
        if (tile.lane % kCoarseLanes == 0) store_scales(stored, scale_now);
      }
    }
    unpack(param_tensor, now.param, x);
    update_vector<M>(x, m, w, held, spent, now.update, update_column, shrink, s);
    const uint4 random =
        draws ? random_words(element / 8, index, step, s.seed) : make_uint4(0, 0, 0, 0);
    element += static_cast<uint64_t>(pitch);
    if (there) store_pack(Tag<P>(), param_tensor, param_now, x, random, stochastic);
    if constexpr (is8bit) {
      uint2 codes;
      const float absmax = encode_vector(m, w, there, tile.lanes, &codes);
      __syncwarp();  // all lanes have read the old absmax before one writes the new
      if (there) {
        __stcg(reinterpret_cast<uint2*>(exp_avg_now), codes);
        if (tile.lane == 0) __stcg(scale_now, absmax);
      }
    } else if (!kCoarse<M> && there) {
      float4* out = reinterpret_cast<float4*>(exp_avg_now);
      __stcg(out, make_float4(m[0], m[1], m[2], m[3]));
      __stcg(out + 1, make_float4(m[4], m[5], m[6], m[7]));
    }
  }
  return agreeing;
}

// The momentum of a warp's block, times beta1; zeros behind its end.
template <class M>
__device__ __forceinline__ void load_block(const Parameter& p, const BlockPlace<kBlockSize>& place,
                                           float beta1, float* m) {
  const M* stored = p.exp_avg.as<const M>() + place.first;
  float scale = 0.0f;
  if constexpr (sizeof(M) == 1) {
    if (place.count > 0) scale = p.absmax[place.block] * beta1;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= place.count) {
      m[i] = 0.0f;
    } else if constexpr (sizeof(M) == 1) {
      m[i] = decode_one(stored[i], scale);
    } else {
      m[i] = stored[i] * beta1;
    }
  }
}

// Stores the new momentum of a warp's block.
template <class M>
__device__ __forceinline__ void store_block(const Parameter& p, const BlockPlace<kBlockSize>& place,
                                            const float* m, const float* decaying) {
  if constexpr (sizeof(M) == 1) {
    uint2 codes;
    const float absmax = encode_vector(m, decaying, place.count > 0, kWarp, &codes);
    if (place.block < 0) return;
    store_codes(codes, place, p.exp_avg.as<int8_t>());
    if (threadIdx.x % kWarp == 0) p.absmax[place.block] = absmax;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < place.count) p.exp_avg.as<float>()[place.first + i] = m[i];
    }
  }
}

// The same for any layout: eight blocks, a warp each, or sixteen of coarse codes.
template <class M, bool count_only>
__device__ __forceinline__ int apply_blocks(const Parameter& p, const StepSettings& s,
                                            int64_t task) {
  const BlockPlace<kBlock<M>> place(p.slices, p.slice_len, task);
  const bool stochastic = s.stochastic, cautious = s.cautious;
  const float spent = kCoarse<M> ? p.scalars->spent : 0.0f;
  float g[kVector], m[kVector], w[kVector] = {}, x[kVector] = {}, held[kVector] = {};
  int agreeing = 0;
  load_some(p.grad, place.first, place.count, g);
  load_block<M>(p, place, s.beta1, m);
  if (!count_only) load_some(p.param, place.first, place.count, x);
  const auto for_elements = [&](const auto& visit) {
    int64_t row = place.first / p.k, column = place.first - row * p.k, matrix = row / p.n;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= place.count) continue;
      visit(i, row, matrix * p.k + column);
      if (++column == p.k) {
        column = 0;
        ++row;
        matrix = row / p.n;
      }
    }
  };
  const auto update_one = [&](int i, int64_t row, int64_t in_columns) {
    const float update = precondition(direction<M>(m[i], w[i], s, held[i], spent),
                                      p.update_row[row], p.update_col[in_columns]);
    x[i] = updated(x[i], m[i], w[i], update, p.scalars->shrink, cautious);
  };
  for_elements([&](int i, int64_t row, int64_t in_columns) {
    w[i] = precondition(g[i], p.row_gain[row], p.col_factor[in_columns]);
    m[i] = momentum(m[i], w[i]);
    if (count_only) {
      agreeing += agrees(m[i], w[i]) ? 1 : 0;
    } else if constexpr (!kCoarse<M>) {
      update_one(i, row, in_columns);
    }
  });
  if (count_only) return agreeing;
  if constexpr (kCoarse<M>) {
    keep(m, w, held);
    store_block<M>(p, place, held);
    for_elements(update_one);
  }
  uint4 random = make_uint4(0, 0, 0, 0);
  if (stochastic && p.param.dtype != kFloat32) {
    random = random_words_at(p.offset + static_cast<uint64_t>(place.first), p.index,
                             p.scalars->step, s.seed);
  }
  store_some(p.param, place.first, place.count, x, random, stochastic);
  if constexpr (!kCoarse<M>) {
    __syncwarp();  // all codes are read before the first is written
    store_block<M>(p, place, m, w);
  }
  return 0;
}

// The same where a thread's eight elements are in one row and aligned; 8-bit momentum.
template <class P, class G, bool count_only>
__device__ __forceinline__ int apply_vector_blocks(const Parameter& p, const StepSettings& s,
                                                   int64_t task) {
  const BlockPlace<kBlockSize> place(p.slices, p.slice_len, task);
  const bool there = place.count > 0;  // all eight, then
  const int64_t e = place.first, row = e / p.k;
  const int64_t first_column = row / p.n * p.k + (e - row * p.k);
  float w[kVector] = {}, m[kVector] = {};
  int agreeing = 0;
  if (there) {
    float g[kVector], decayed[kVector], column_factor[kVector];
    const float4* factors = reinterpret_cast<const float4*>(p.col_factor + first_column);
    unpack_floats(factors[0], factors[1], column_factor);
    unpack(p.grad, load_pack<G>(p.grad, e), g);
    const uint2 codes = __ldcg(reinterpret_cast<const uint2*>(p.exp_avg.as<const int8_t>() + e));
    decode_vector(codes, __ldcg(p.absmax + place.block) * s.beta1, p.byte_pattern, decayed);
    new_momentum(g, decayed, p.row_gain[row], column_factor, w, m);
  }
  if (count_only) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) agreeing += there && agrees(m[i], w[i]) ? 1 : 0;
    return agreeing;
  }
  if (there) {
    float x[kVector], update_column[kVector];
    const float4* factors = reinterpret_cast<const float4*>(p.update_col + first_column);
    unpack_floats(factors[0], factors[1], update_column);
    unpack(p.param, load_pack<P>(p.param, e), x);
    update_vector<int8_t>(x, m, w, m, 0.0f, p.update_row[row], update_column, p.scalars->shrink, s);
    const uint4 random = s.stochastic && p.param.dtype != kFloat32
                             ? random_words((p.offset + static_cast<uint64_t>(e)) / 8, p.index,
                                            p.scalars->step, s.seed)
                             : make_uint4(0, 0, 0, 0);
    store_pack(Tag<P>(), p.param, bytes_at<P>(p.param, e), x, random, s.stochastic);
  }
  uint2 codes;
  const float absmax = encode_vector(m, w, there, kWarp, &codes);
  __syncwarp();  // all lanes have read the old absmax before one writes the new
  if (there) *reinterpret_cast<uint2*>(p.exp_avg.as<int8_t>() + e) = codes;
  if (place.block >= 0 && threadIdx.x % kWarp == 0) p.absmax[place.block] = absmax;
  return 0;
}

template <class P, class G, class M, Access access, bool count_only>
__device__ __forceinline__ int apply_task(const Parameter& p, const StepSettings& s, int64_t task) {
  if constexpr (access == kTiles) {
    return apply_tile<P, G, M, count_only>(p, s, task);
  } else if constexpr (access == kBlocks) {
    return apply_vector_blocks<P, G, count_only>(p, s, task);
  } else {
    return apply_blocks<M, count_only>(p, s, task);
  }
}

// Sum over the block of what its threads counted; thread 0 stores it.
__device__ __forceinline__ void store_count(int count, int* out, float* buffer) {
  int* counts = reinterpret_cast<int*>(buffer);
  __syncthreads();
  counts[threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int total = 0;
  for (int i = 0; i < kThreads; ++i) total += counts[i];
  *out = total;
}

}  // namespace came8bit
