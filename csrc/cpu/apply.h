// Sweep C: momentum, update, rounding, and the 8-bit code. Included once per instruction set.
#pragma once

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Constants of a step, broadcast.
struct Broadcast {
  F kappa, beta1, one_minus_beta1, shrink, beta2, one_minus_beta2, eps1, sign, correction2, scale;
  explicit CAME8BIT_INLINE Broadcast(const StepConstants& c)
      : kappa(c.kappa),
        beta1(c.beta1),
        one_minus_beta1(c.one_minus_beta1),
        shrink(c.shrink),
        beta2(c.beta2),
        one_minus_beta2(c.one_minus_beta2),
        eps1(c.eps1),
        sign(c.sign),
        correction2(c.correction2),
        scale(c.scale) {}
};

CAME8BIT_INLINE F full_second_moment(F g, F old, const Broadcast& c) {
  return ema(old, c.beta2, g * g + c.eps1, c.one_minus_beta2);
}

// u and m_t of the lanes at `j`; for a full second moment also its new value.
template <class G, bool is8bit, bool factored>
CAME8BIT_INLINE void load_update(const Broadcast& c, const Segment& s, F row_factor, F absmax,
                                 int j, int size, F& u, F& m_t, F& v) {
  const F g = load_some(static_cast<const G*>(s.grad) + j, size);
  if constexpr (factored) {
    u = precondition(g, row_factor, load_some(s.col_factor + j, size));
  } else {
    v = full_second_moment(g, load_some(s.exp_avg_sq + j, size), c);
    u = precondition_unfactored(g, v, c.sign, c.correction2);
  }
  F m;
  if constexpr (is8bit) {
    m = load_momentum(s.codes + j, size, absmax);
  } else {
    m = load_momentum(s.exp_avg + j, size, absmax);
  }
  m_t = momentum(m, u, c.kappa, c.beta1, c.one_minus_beta1);
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

template <class P, class G, bool is8bit, bool factored>
void apply(const StepConstants& constants, const Segment& s) {
  const Broadcast c(constants);
  const F row_factor(s.row_factor), update_row(s.update_row), absmax(s.absmax);
  const auto lanes = [&](int j, int size) CAME8BIT_LAMBDA {
    F u, m_t, v;
    load_update<G, is8bit, factored>(c, s, row_factor, absmax, j, size, u, m_t, v);
    F update;
    if constexpr (factored) {
      update = precondition(m_t, update_row, load_some(s.update_col + j, size));
    } else {
      update = m_t * c.scale;
      store_some(s.exp_avg_sq + j, v, size);
    }
    if (constants.cautious) update = select(agrees(m_t, u), update, F(0.0f));
    P* p = static_cast<P*>(s.param) + j;
    store_param(p, decay_and_apply(load_some(p, size), c.shrink, update),
                s.random ? s.random + j : nullptr, size);
    store_some(s.exp_avg + j, m_t, size);
    if constexpr (is8bit) {
      const F bias = select(u == F(0.0f), F(kDecayBias), F(kNearestBias));
      store_some(s.bias + j, bias, size);
    }
  };
  int j = 0;
  for (; j + kLanes <= s.size; j += kLanes) lanes(j, kLanes);
  if (j < s.size) lanes(j, s.size - j);
}

template <class G, bool is8bit, bool factored>
int agreeing(const StepConstants& constants, const Segment& s) {
  const Broadcast c(constants);
  const F row_factor(s.row_factor), absmax(s.absmax);
  int total = 0;
  for (int j = 0; j < s.size; j += kLanes) {
    const int size = s.size - j < kLanes ? s.size - j : kLanes;
    F u, m_t, v;
    load_update<G, is8bit, factored>(c, s, row_factor, absmax, j, size, u, m_t, v);
    // Lanes past the end have u == 0 and are never counted.
    total += count(agrees(m_t, u));
  }
  return total;
}

const uint16_t* random_bits(const StepConstants& c, uint64_t element, int size, uint16_t* buffer) {
  // Lane 4q+i draws for counter 4i+q, so that interleaving stores counters in order.
  alignas(64) static const int32_t kOrder[kLanes] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                     2, 6, 10, 14, 3, 7, 11, 15};
  const I order = load(kOrder);
  const uint64_t first = element / 8 / kLanes * kLanes;  // aligned: the low word cannot overflow
  const uint64_t last = (element + static_cast<uint64_t>(size) - 1) / 8;
  uint16_t* out = buffer;
  for (uint64_t counter = first; counter <= last; counter += kLanes, out += 8 * kLanes) {
    I c0 = I(static_cast<int32_t>(static_cast<uint32_t>(counter))) + order;
    I c1(static_cast<int32_t>(static_cast<uint32_t>(counter >> 32)));
    I c2(static_cast<int32_t>(c.index)), c3(static_cast<int32_t>(c.step));
    philox(c0, c1, c2, c3, c.seed);
    uint32_t words[4 * kLanes];
    store_interleaved(words, c0, c1, c2, c3);
    for (int i = 0; i < 4 * kLanes; ++i) {
      out[2 * i] = static_cast<uint16_t>(words[i]);
      out[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
  return buffer + (element - first * 8);
}

void encode(const float* x, const float* bias, int size, int8_t* codes, float* absmax) {
  const F infinity(INFINITY), zero(0.0f);
  F largest = zero;
  for (int j = 0; j < size; j += kLanes) {
    const F magnitude = abs(load_some(x + j, size - j));
    largest = larger(select(magnitude < infinity, magnitude, zero), largest);
  }
  const float block = largest_lane(largest);
  *absmax = block < kSmallestAbsmax ? 0.0f : block;
  const F inverse(inverse_absmax(block)), nearest(kNearestBias);
  for (int j = 0; j < size; j += kLanes) {
    const F value = load_some(x + j, size - j);
    const F round = bias ? load_some(bias + j, size - j) : nearest;
    const I level = truncate(code_level(value, inverse, round));
    const I code = select(value < zero, I(0) - level, level);
    store_some(codes + j, select(abs(value) < infinity, code, I(kNanCode)), size - j);
  }
}

void decode(const int8_t* codes, float absmax, int size, float* x) {
  const F scale(absmax);
  for (int j = 0; j < size; j += kLanes) {
    store_some(x + j, decode_lanes(load_some(codes + j, size - j), scale), size - j);
  }
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
