// Sweep C: momentum, update and rounding.
#pragma once

#include "codec.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Constants of a step, broadcast.
struct Broadcast {
  F gain, beta1, shrink, beta2, one_minus_beta2, eps1, sign, correction2, scale;
  explicit CAME8BIT_INLINE Broadcast(const StepConstants& c)
      : gain(c.gain),
        beta1(c.beta1),
        shrink(c.shrink),
        beta2(c.beta2),
        one_minus_beta2(c.one_minus_beta2),
        eps1(c.eps1),
        sign(c.sign()),
        correction2(c.correction2),
        scale(c.scale) {}
};

CAME8BIT_INLINE F full_second_moment(F g, F old, const Broadcast& c) {
  return ema(old, c.beta2, g * g + c.eps1, c.one_minus_beta2);
}

template <class G>
float sum_u2(const StepConstants& constants, const void* grad, const float* exp_avg_sq, int size) {
  const Broadcast c(constants);
  const G* gradient = static_cast<const G*>(grad);
  return chunked_sum(size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F g = load_some(gradient + j, some);
    const F v = full_second_moment(g, load_some(exp_avg_sq + j, some), c);
    const F u = precondition_unfactored(g, v, c.sign, c.correction2);
    return u * u;
  });
}

// w and m_t of the lanes at `j`; for a full second moment also its new value.
template <class G, bool is8bit, bool factored>
CAME8BIT_INLINE void load_update(const Broadcast& c, const Segment& s, F row_gain, F absmax, int j,
                                 int size, F& w, F& m_t, F& v) {
  const F g = load_some(static_cast<const G*>(s.grad) + j, size);
  if constexpr (factored) {
    w = precondition(g, row_gain, load_some(s.col_factor + j, size));
  } else {
    v = full_second_moment(g, load_some(s.exp_avg_sq + j, size), c);
    w = precondition_unfactored(g, v, c.sign, c.correction2) * c.gain;
  }
  if constexpr (is8bit) {
    m_t = momentum(decode_lanes(load_some(s.codes + j, size), absmax), w);
  } else {
    m_t = momentum(load_some(s.exp_avg + j, size) * c.beta1, w);
  }
}

const uint16_t* random_bits(const StepConstants& c, uint64_t element, int size, uint16_t* buffer) {
  const uint64_t first = element / kDraw * 8;
  const uint64_t last = (element + static_cast<uint64_t>(size) - 1) / 8;
  uint16_t* out = buffer;
  for (uint64_t counter = first; counter <= last; counter += 8, out += kDraw) {
    W c0 = consecutive(counter);
    W c1 = high_half(c0), c2(c.index), c3(c.step);
    philox(c0, c1, c2, c3, c.seed);
    store_words(out, c0, c1, c2, c3);
  }
  return buffer + (element - first * 8);
}

CAME8BIT_INLINE void store_param(float* p, F value, const uint16_t*, int size) {
  store_some(p, value, size);
}
CAME8BIT_INLINE void store_param(Bf16* p, F value, const uint16_t* random, int size) {
  const I bits = random ? load_some(random, size) : I(0);
  store_some(p, round_bf16(value, bits, random != nullptr), size);
}
CAME8BIT_INLINE void store_param(Half* p, F value, const uint16_t* random, int size) {
  store_some(p, random ? round_fp16(value, load_some(random, size)) : value, size);
}

// How many elements ahead sweep C asks for memory; while a block is encoded no load is under way.
constexpr int kAhead = 1536;

template <class P, class G, bool is8bit, bool factored>
Applied apply(const StepConstants& constants, const Segment& segment) {
  const Segment s = segment;  // a copy of its own: the stores below cannot alias it
  const bool cautious = constants.cautious, nesterov = constants.nesterov;
  const Broadcast c(constants);
  const F row_gain(s.row_gain), update_row(s.update_row), absmax(s.absmax);
  F largest(0.0f);
  M zero_w = F(0.0f) < F(0.0f);
  const auto lanes = [&](int j, int size) CAME8BIT_LAMBDA {
    prefetch(static_cast<const G*>(s.grad) + j + kAhead);
    prefetch(static_cast<const P*>(s.param) + j + kAhead);
    if (is8bit && j % kLine == 0) prefetch(s.codes + j + kAhead);
    F w, m_t, v;
    load_update<G, is8bit, factored>(c, s, row_gain, absmax, j, size, w, m_t, v);
    const F direction = nesterov ? look_ahead(m_t, w, c.beta1) : m_t;
    F update;
    if constexpr (factored) {
      update = precondition(direction, update_row, load_some(s.update_col + j, size));
    } else {
      update = direction * c.scale;
      store_some(s.exp_avg_sq + j, v, size);
    }
    if (cautious) update = select(agrees(m_t, w), update, F(0.0f));
    P* p = static_cast<P*>(s.param) + j;
    store_param(p, decay_and_apply(load_some(p, size), c.shrink, update),
                s.random ? s.random + j : nullptr, size);
    store_some(s.exp_avg + j, m_t, size);
    if constexpr (is8bit) {
      largest = larger(abs(m_t), largest);
      zero_w = zero_w | (w == F(0.0f));
    }
  };
  int j = 0;
  for (; j + kLanes <= s.size; j += kLanes) lanes(j, kLanes);
  // Lanes past the end hold zeros in every input: m_t is not the largest there, and a zero w only
  // makes `steps` have a look.
  if (j < s.size) lanes(j, s.size - j);
  if constexpr (!is8bit) return {};
  return {largest_lane(largest), any(zero_w)};
}

template <class G>
void steps(const Segment& s, float* step) {
  const F row_gain(s.row_gain), zero(0.0f);
  for (int j = 0; j < s.size; j += kLanes) {
    const int size = s.size - j < kLanes ? s.size - j : kLanes;
    F w = load_some(static_cast<const G*>(s.grad) + j, size);
    // With a full second moment the gradient itself decides.
    if (s.col_factor) w = precondition(w, row_gain, load_some(s.col_factor + j, size));
    store_some(step + j, select(w == zero, F(kDecayStep), F(kNearestStep)), size);
  }
}

template <class G, bool is8bit, bool factored>
int agreeing(const StepConstants& constants, const Segment& s) {
  const Broadcast c(constants);
  const F row_gain(s.row_gain), absmax(s.absmax);
  int total = 0;
  for (int j = 0; j < s.size; j += kLanes) {
    const int size = s.size - j < kLanes ? s.size - j : kLanes;
    F w, m_t, v;
    load_update<G, is8bit, factored>(c, s, row_gain, absmax, j, size, w, m_t, v);
    // Lanes past the end have w == 0 (or NaN) and are never counted.
    total += count(agrees(m_t, w));
  }
  return total;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
