// Sweep C of a factored parameter: momentum, update, rounding, and the 8-bit code.
#pragma once

#include "residual.cuh"
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

__device__ __forceinline__ float updated(float p, float m, float w, float update, float shrink,
                                         bool cautious) {
  if (cautious && !agrees(m, w)) update = 0.0f;
  return decay_and_apply(p, shrink, update);
}

CAME8BIT_INLINE int64_t apply_tiles(const Parameter& p, bool fast) {
  if (fast) return p.b * ((p.n + p.apply_rows() - 1) / p.apply_rows()) * p.grid.strips;
  const int64_t blocks = p.slices * p.blocks_per_slice;
  return (blocks + kWarps - 1) / kWarps;
}

// beta1 times the stored momentum of eight elements of row r, one of many under way.
struct MomentumVector8 {
  uint2 codes;
  float absmax;
  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int64_t row) {
    codes = *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(p.exp_avg) + row * p.k +
                                            tile.column);
    absmax = p.absmax[row * p.grid.strips + tile.strip];
  }
  __device__ __forceinline__ void decayed(float beta1, float* m) const {
    decode_vector(codes, absmax * beta1, m);
  }
};
struct MomentumVector32 {
  float4 low, high;
  __device__ __forceinline__ void load(const Parameter& p, const Tile& tile, int64_t row) {
    const float4* m = reinterpret_cast<const float4*>(static_cast<const float*>(p.exp_avg) +
                                                      row * p.k + tile.column);
    low = m[0];
    high = m[1];
  }
  __device__ __forceinline__ void decayed(float beta1, float* m) const {
    unpack_floats(low, high, m);
#pragma unroll
    for (int i = 0; i < kVector; ++i) m[i] = m[i] * beta1;
  }
};
template <class M>
struct MomentumVectorOf {
  using type = MomentumVector32;
};
template <>
struct MomentumVectorOf<int8_t> {
  using type = MomentumVector8;
};

// A tile of rows whose blocks of the 8-bit code end where the rows do. With `count_only` the tile
// only counts the elements that the cautious mask keeps.
template <class P, class G, class M, bool count_only>
__device__ __forceinline__ int apply_tile(const Parameter& p, const Settings& s, int64_t task) {
  constexpr bool is8bit = sizeof(M) == 1;
  const int64_t slabs = (p.n + p.apply_rows() - 1) / p.apply_rows();
  const Tile tile(p, task, p.apply_rows(), slabs);
  const float shrink = p.scalars->shrink;
  const uint32_t step = p.scalars->step;
  const bool stochastic = s.stochastic, cautious = s.cautious;
  const bool draws = stochastic && p.param.dtype != kFloat32;
  const bool inside = tile.columns > 0;
  float column_factor[kVector], update_column[kVector];
  const int64_t first_column = tile.matrix * p.k + tile.column;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    column_factor[i] = inside ? p.col_factor[first_column + i] : 0.0f;
    update_column[i] = inside && !count_only ? p.update_col[first_column + i] : 0.0f;
  }
  // What is read of one row; the next row's is on its way while this one's is worked on.
  struct Row {
    Pack<G> grad;
    Pack<P> param;
    typename MomentumVectorOf<M>::type momenta;
    float gain, update;
  };
  const auto load_row = [&](int base) {
    Row r = {};
    if (inside && base + tile.stream < tile.rows) {
      const int64_t row = tile.first_row + base + tile.stream;
      r.grad = load_pack<G>(p.grad, row * p.k + tile.column);
      if (!count_only) r.param = load_pack<P>(p.param, row * p.k + tile.column);
      r.momenta.load(p, tile, row);
      r.gain = p.row_gain[row];
      if (!count_only) r.update = p.update_row[row];
    }
    return r;
  };
  int agreeing = 0;
  Row next = load_row(0);
  // Every thread takes part in every round: the largest value of a block needs all lanes.
  for (int base = 0; base < tile.rows; base += tile.streams) {
    const Row now = next;
    next = load_row(base + tile.streams);
    const bool there = inside && base + tile.stream < tile.rows;
    const int64_t row = tile.first_row + base + tile.stream;
    const int64_t e = row * p.k + tile.column;
    float g[kVector], decayed[kVector], w[kVector], m[kVector];
    unpack(p.grad, now.grad, g);
    now.momenta.decayed(s.beta1, decayed);
    new_momentum(g, decayed, now.gain, column_factor, w, m);
    if (count_only) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) agreeing += there && agrees(m[i], w[i]) ? 1 : 0;
      continue;
    }
    float x[kVector];
    unpack(p.param, now.param, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = updated(x[i], m[i], w[i], precondition(m[i], now.update, update_column[i]), shrink,
                     cautious);
    }
    const uint4 random =
        draws ? random_words((p.offset + static_cast<uint64_t>(e)) / 8, p.index, step, s.seed)
              : make_uint4(0, 0, 0, 0);
    if (there) store_pack(Tag<P>(), p.param, e, x, random, stochastic);
    if constexpr (is8bit) {
      bool decays[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) decays[i] = w[i] == 0.0f;
      uint2 codes;
      const float absmax = encode_vector(m, decays, tile.lanes, &codes);
      __syncwarp();  // all lanes have read the old absmax before one writes the new
      if (there) {
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.exp_avg) + e) = codes;
        if (tile.lane == 0) p.absmax[row * p.grid.strips + tile.strip] = absmax;
      }
    } else if (there) {
      float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.exp_avg) + e);
      out[0] = make_float4(m[0], m[1], m[2], m[3]);
      out[1] = make_float4(m[4], m[5], m[6], m[7]);
    }
  }
  return agreeing;
}

// The 256 elements, or fewer, of one block of the 8-bit code, wherever rows end: a warp's work.
struct BlockPlace {
  int64_t block;  // -1: there is none for this warp
  int64_t first;  // element of this thread
  int count;      // how many of its kVector elements there are

  __device__ __forceinline__ BlockPlace(const Parameter& p, int64_t task) {
    block = task * kWarps + threadIdx.x / kWarp;
    first = 0;
    count = 0;
    if (block >= p.slices * p.blocks_per_slice) {
      block = -1;
      return;
    }
    const int64_t slice = block / p.blocks_per_slice;
    const int64_t at =
        (block - slice * p.blocks_per_slice) * kBlockSize + int64_t{threadIdx.x % kWarp} * kVector;
    const int64_t left = p.slice_len - at;
    first = slice * p.slice_len + at;
    count = static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector);
  }
};

// Stores the new momentum of a warp's block.
template <class M>
__device__ __forceinline__ void store_block(const Parameter& p, const BlockPlace& place,
                                            const float* m, const bool* decays) {
  if constexpr (sizeof(M) == 1) {
    uint2 codes;
    const float absmax = encode_vector(m, decays, kWarp, &codes);
    if (place.block < 0) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t word = i < 4 ? codes.x : codes.y;
      if (i < place.count) {
        static_cast<uint8_t*>(p.exp_avg)[place.first + i] =
            static_cast<uint8_t>(word >> (8 * (i % 4)));
      }
    }
    if (threadIdx.x % kWarp == 0) p.absmax[place.block] = absmax;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < place.count) static_cast<float*>(p.exp_avg)[place.first + i] = m[i];
    }
  }
}

// The same for any layout: eight blocks, a warp each.
template <class M, bool count_only>
__device__ __forceinline__ int apply_blocks(const Parameter& p, const Settings& s, int64_t task) {
  const BlockPlace place(p, task);
  const bool stochastic = s.stochastic, cautious = s.cautious;
  float m[kVector] = {};
  bool decays[kVector] = {};
  int agreeing = 0;
  uint4 random = make_uint4(0, 0, 0, 0);
  if (!count_only && stochastic && p.param.dtype != kFloat32) {
    random = random_words_at(p.offset + static_cast<uint64_t>(place.first), p.index,
                             p.scalars->step, s.seed);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= place.count) continue;
    const int64_t e = place.first + i, row = e / p.k;
    const int64_t column = row / p.n * p.k + (e - row * p.k);
    const float w = precondition(load_one(p.grad, e), p.row_gain[row], p.col_factor[column]);
    m[i] = momentum(load_momentum(p, e, s.beta1, static_cast<M*>(nullptr)), w);
    decays[i] = w == 0.0f;
    if (count_only) {
      agreeing += agrees(m[i], w) ? 1 : 0;
      continue;
    }
    const float update = precondition(m[i], p.update_row[row], p.update_col[column]);
    const float x = updated(load_one(p.param, e), m[i], w, update, p.scalars->shrink, cautious);
    const uint32_t bits = word_of(random, i / 2) >> (16 * (i % 2)) & 0xffffu;
    store_one(p.param, e, x, bits, stochastic);
  }
  if (!count_only) {
    __syncwarp();  // all codes are read before the first is written
    store_block<M>(p, place, m, decays);
  }
  return agreeing;
}

template <class P, class G, class M, bool fast, bool count_only>
__device__ __forceinline__ int apply_task(const Parameter& p, const Settings& s, int64_t task) {
  if constexpr (fast) {
    return apply_tile<P, G, M, count_only>(p, s, task);
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
