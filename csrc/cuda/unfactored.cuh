// The three sweeps of a parameter with a full second moment (0-D, 1-D, narrow matrices).
#pragma once

#include "apply.cuh"

namespace came8bit {

CAME8BIT_INLINE int64_t flat_tiles(const Parameter& p) {
  return (p.numel() + kFlatTile - 1) / kFlatTile;
}

// Gradients, and (with `second_moments`) the new second moments, of eight elements.
template <bool fast>
__device__ __forceinline__ int load_flat(const Parameter& p, const StepSettings& s, int64_t e,
                                         bool second_moments, float* g, float* v) {
  const int64_t left = p.numel() - e;
  const int count = static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector);
  if (fast && count == kVector) {
    unpack(p.grad, load_pack<Any>(p.grad, e), g);
  } else {
    load_some<fast>(p.grad, e, count, g);
  }
  if (!second_moments) return count;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    v[i] = i < count ? ema(p.exp_avg_sq[e + i], s.beta2, g[i] * g[i] + s.eps1, s.one_minus_beta2)
                     : 1.0f;
  }
  return count;
}

// Sum over a tile of g*g, or (`of_u`) of u*u, into tile_sum or behind it.
template <bool fast, bool of_u>
__device__ __forceinline__ void flat_sum_tile(const Parameter& p, const StepSettings& s,
                                              int64_t task, float* buffer) {
  const float sign = s.sign(), correction2 = p.scalars->correction2;
  float sum = 0.0f;
  for (int round = 0; round < kFlatRounds; ++round) {
    const int64_t e =
        task * kFlatTile + int64_t{round} * kRoundVectors + int64_t{threadIdx.x} * kVector;
    float g[kVector], v[kVector], square[kVector];
    load_flat<fast>(p, s, e, of_u, g, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float x = of_u ? precondition_unfactored(g[i], v[i], sign, correction2) : g[i];
      square[i] = x * x;
    }
    sum += sum_vector(square);
  }
  __syncthreads();  // the previous user of the buffer is done
  buffer[threadIdx.x] = sum;
  halve(buffer, kThreads, 1);
  if (threadIdx.x == 0) p.tile_sum[(of_u ? flat_tiles(p) : 0) + task] = buffer[0];
}

// Whether the gradient is finite, known to all threads alike. One block gives out the sum.
__device__ __forceinline__ bool flat_alive(const Parameter& p, const StepSettings& s, float* buffer,
                                           bool gives_out) {
  if (p.scalars->decided) return p.scalars->alive;
  const float total = block_sum(p.tile_sum, flat_tiles(p), buffer);
  if (gives_out && threadIdx.x == 0 && p.grad_square.pointer != nullptr) *p.grad_square = total;
  return is_finite(total) || s.propagate;
}

// What the last sweep needs to know; every block finds it out for itself.
struct FlatState {
  bool done;
  float gain, scale;
};

__device__ __forceinline__ FlatState flat_state(const Parameter& p, const StepSettings& s,
                                                int64_t agreeing_tiles, float* buffer) {
  FlatState state = {};
  if (p.scalars->decided) {
    const Scalars& scalars = *p.scalars;
    return {scalars.alive != 0, gain(scalars.kappa, s.one_minus_beta1), scalars.lr_scale};
  }
  if (!flat_alive(p, s, buffer, false)) return state;
  const float total_u2 = block_sum(p.tile_sum + flat_tiles(p), flat_tiles(p), buffer);
  state.done = is_finite(total_u2) || s.propagate;
  const float rms = root_mean(total_u2, static_cast<float>(p.numel()));
  state.gain = gain(clip_scale(rms, s.clip_threshold), s.one_minus_beta1);
  state.scale = p.scalars->lr_scale;
  if (s.cautious && agreeing_tiles > 0) {
    const int64_t agreeing = block_count(p.agreeing, agreeing_tiles, buffer);
    state.scale =
        state.scale * cautious_scale(static_cast<float>(agreeing), static_cast<float>(p.numel()));
  }
  return state;
}

// Sweep C of eight blocks, a warp each.
template <class M, bool fast, bool count_only>
__device__ __forceinline__ int apply_flat_blocks(const Parameter& p, const StepSettings& s,
                                                 const FlatState& state, int64_t task) {
  const BlockPlace<kBlock<M>> place(p.slices, p.slice_len, task);
  const bool stochastic = s.stochastic, cautious = s.cautious;
  const float sign = s.sign(), spent = kCoarse<M> ? p.scalars->spent : 0.0f;
  float g[kVector], v[kVector], x[kVector], w[kVector] = {}, m[kVector], held[kVector] = {};
  const bool whole = fast && place.count == kVector;
  if (whole) {
    unpack(p.grad, load_pack<Any>(p.grad, place.first), g);
  } else {
    load_some<fast>(p.grad, place.first, place.count, g);
  }
  if (!count_only) {
    if (whole) {
      unpack(p.param, load_pack<Any>(p.param, place.first), x);
    } else {
      load_some<fast>(p.param, place.first, place.count, x);
    }
  }
  load_block<M>(p, place, s.beta1, m);
  const auto update_one = [&](int i) {
    const float update = direction<M>(m[i], w[i], s, held[i], spent) * state.scale;
    x[i] = updated(x[i], m[i], w[i], update, p.scalars->shrink, cautious);
  };
  int agreeing = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= place.count) continue;
    const int64_t e = place.first + i;
    v[i] = ema(p.exp_avg_sq[e], s.beta2, g[i] * g[i] + s.eps1, s.one_minus_beta2);
    w[i] = precondition_unfactored(g[i], v[i], sign, p.scalars->correction2) * state.gain;
    m[i] = momentum(m[i], w[i]);
    if (count_only) {
      agreeing += agrees(m[i], w[i]) ? 1 : 0;
      continue;
    }
    p.exp_avg_sq[e] = v[i];
    if constexpr (!kCoarse<M>) update_one(i);
  }
  if (count_only) return agreeing;
  if constexpr (kCoarse<M>) {
    keep(m, g, held);  // with a full second moment the gradient itself decides
    store_block<M>(p, place, held);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < place.count) update_one(i);
    }
  }
  uint4 random = make_uint4(0, 0, 0, 0);
  if (stochastic && p.param.dtype != kFloat32) {
    random = random_words_at(p.offset + static_cast<uint64_t>(place.first), p.index,
                             p.scalars->step, s.seed);
  }
  if (whole) {
    store_pack(Tag<Any>(), p.param, bytes_at<Any>(p.param, place.first), x, random, stochastic);
  } else {
    store_some<fast>(p.param, place.first, place.count, x, random, stochastic);
  }
  if constexpr (!kCoarse<M>) {
    __syncwarp();                    // all codes are read before the first is written
    store_block<M>(p, place, m, g);  // with a full second moment the gradient itself decides
  }
  return 0;
}

CAME8BIT_INLINE int64_t flat_apply_tasks(const Parameter& p) {
  return (p.slices * p.blocks_per_slice + p.blocks_at_once() - 1) / p.blocks_at_once();
}

__device__ __forceinline__ void close_books(const Parameter& p, bool done) {
  if (p.scalars->decided) return;  // and counted
  ++*(done ? p.step : p.skipped);
}

}  // namespace came8bit
