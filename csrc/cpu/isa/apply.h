// Sweep C: momentum, update and rounding, as passes over a piece of a row.
#pragma once

#include "packed.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

template <class G>
CAME8BIT_INLINE F full_second_moment(const StepConstants& c, const G* grad, const float* exp_avg_sq,
                                     int size) {
  const F g = load_some(grad, size);
  return ema(load_some(exp_avg_sq, size), F(c.beta2), g * g + F(c.eps1), F(c.one_minus_beta2));
}

template <class G>
float sum_u2(const StepConstants& c, const void* grad, const float* exp_avg_sq, int size) {
  const G* gradient = static_cast<const G*>(grad);
  return chunked_sum(size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F v = full_second_moment(c, gradient + j, exp_avg_sq + j, some);
    const F g = load_some(gradient + j, some);
    const F u = precondition_unfactored(g, v, F(c.sign()), F(c.correction2));
    return u * u;
  });
}

CAME8BIT_INLINE void store_param(float* p, F value, const uint16_t*, int size) {
  store_some(p, value, size);
}
CAME8BIT_INLINE void store_param(Bf16* p, F value, const uint16_t* random, int size) {
  if (random == nullptr && !any_nan(value)) {
    const I pattern = bits(value);
    store_some(p, pattern + to_nearest_bf16(pattern), size);
    return;
  }
  const I drawn = random != nullptr ? load_some(random, size) : I(0);
  store_some(p, round_bf16(value, drawn, random != nullptr), size);
}
CAME8BIT_INLINE void store_param(Half* p, F value, const uint16_t* random, int size) {
  store_some(p, random ? round_fp16(value, load_some(random, size)) : value, size);
}

// What the options of a parameter are, as numbers known when compiling or as variables.
template <bool nesterov_, bool draws_, bool spends_>
struct Usual {
  static constexpr bool nesterov() { return nesterov_; }
  static constexpr bool spends() { return spends_; }
  static constexpr bool cautious() { return false; }
  static constexpr bool draws() { return draws_; }
};
struct Any {
  bool nesterov_, spends_, cautious_, draws_;
  bool nesterov() const { return nesterov_; }
  bool spends() const { return spends_; }
  bool cautious() const { return cautious_; }
  bool draws() const { return draws_; }
};

// The update of a parameter, lanes by lanes.
template <class P, bool factored, class Options>
struct Update {
  P* const param;
  const float* const kept;
  const uint16_t* const random;
  const F beta1, spent, shrink, scale;
  const Options options;

  CAME8BIT_INLINE Update(const StepConstants& c, const Segment& s, Options options)
      : param(static_cast<P*>(s.param)),
        kept(s.kept),
        random(s.random),
        beta1(c.beta1),
        spent(c.spent),
        shrink(c.shrink),
        scale(c.scale),
        options(options) {}

  // Of the lanes at `j`; row and col() are the factors of a factored second moment.
  template <class Col>
  CAME8BIT_INLINE void operator()(int j, int some, F row, Col col, F m_t, F w) const {
    F direction = options.nesterov() ? look_ahead(m_t, w, beta1) : m_t;
    if (options.spends()) direction = spend(direction, m_t, load_some(kept + j, some), spent);
    F update;
    if constexpr (factored) {
      update = precondition(direction, row, col());
    } else {
      update = direction * scale;
    }
    if (options.cautious()) update = select(agrees(m_t, w), update, F(0.0f));
    store_param(param + j, decay_and_apply(load_some(param + j, some), shrink, update),
                options.draws() ? random + j : nullptr, some);
  }
};

// What becomes of the lanes of the new momentum beside: nothing where the update is a pass of its
// own, else the update.
struct Later {
  static constexpr bool kUpdates = false;
};
template <class Options>
struct AtOnce : Update<float, true, Options> {
  static constexpr bool kUpdates = true;
  using Update<float, true, Options>::Update;
};

// The same as momentum_as() for short rows of codes of which none is NaN, from row `block` on;
// returns the first row that is left.
template <int cols, class G, class MT, bool coded, class Beside>
int momentum_of_short_rows(const Segment& s, int block, ToEncode blocks, const Beside& update) {
  typedef ShortRows<cols> Rows;
  const F zero(0.0f), col_factor = Rows::of_columns(s.col_factor), decay(s.decay);
  F update_col;
  if constexpr (Beside::kUpdates) update_col = Rows::of_columns(s.update_col);
  for (; block + Rows::kRows <= s.rows; block += Rows::kRows) {
    const int begin = block * cols;
    const G* const grad = static_cast<const G*>(s.grad) + begin;
    const MT* const old = advance(static_cast<const MT*>(s.old_exp_avg), begin);
    float *const exp_avg = s.exp_avg + begin, *const new_w = s.w + begin;
    F magnitude[kVectors];
    unsigned zeros[kVectors];
    if (has_nan(old, 64)) return block;
    for (int v = 0; v < kVectors; ++v) {
      const int j = v * kLanes;
      ask_for(grad, j, kAhead);
      if (sizeof(MT) == 1 || !coded) ask_for(old, j, kAhead);
      const F w = precondition(load(grad + j), Rows::of_rows(s.row_gain + block, v), col_factor);
      const F decayed = momentum_of_rows<cols>(old, scales_from<MT>(s.scales, block), decay, v);
      const F m_t = came8bit::momentum(decayed, w);
      store(new_w + j, w);
      store(exp_avg + j, m_t);
      if constexpr (Beside::kUpdates) {
        ask_for(update.param + begin, j, kAhead);
        const F row = Rows::of_rows(s.update_row + block, v);
        update(begin + j, kLanes, row, [&] { return update_col; }, m_t, w);
      }
      magnitude[v] = larger(abs(m_t), zero);
      zeros[v] = mask(w == zero);
    }
    if constexpr (coded) {
      Rows::over_rows(magnitude, larger_lanes, blocks.largest + block);
      for (int i = 0; i < Rows::kRows; ++i) {
        const unsigned of_row = zeros[i * cols / kLanes] >> i * cols % kLanes;
        blocks.decays[block + i] = (of_row & ((1u << cols) - 1)) != 0;
      }
    }
  }
  return block;
}

// w and the new momentum. MT is the old one as it is given: int8_t, Packed or float.
template <class G, class MT, bool coded, bool factored, class Beside>
CAME8BIT_INLINE void momentum_as(const StepConstants& c, const Segment& s, ToEncode blocks,
                                 const Beside& update) {
  // Copies, which the stores below cannot alias.
  const G* const grad = static_cast<const G*>(s.grad);
  const MT* const old = static_cast<const MT*>(s.old_exp_avg);
  const float* const col_factor = s.col_factor;
  float *const exp_avg = s.exp_avg, *const new_w = s.w;
  const int all = s.rows * s.size;
  for (int begin = 0, block = 0; begin < all; begin += s.block_size, ++block) {
    if constexpr (factored) {
      if (s.size == 8) block = momentum_of_short_rows<8, G, MT, coded>(s, block, blocks, update);
      if (s.size == 16) block = momentum_of_short_rows<16, G, MT, coded>(s, block, blocks, update);
      begin = block * s.block_size;
      if (begin == all) return;
    }
    const int size = all - begin < s.block_size ? all - begin : s.block_size;
    // One row, or rows that are blocks.
    const int row = s.rows == 1 ? 0 : block, column = s.rows == 1 ? begin : 0;
    const F row_gain(factored ? s.row_gain[row] : 0.0f);
    const F update_row(Beside::kUpdates ? s.update_row[row] : 0.0f);
    const float* const update_col = s.update_col;
    F largest(0.0f), smallest(INFINITY);
    const auto* scales = scales_from<MT>(s.scales, block);
    with_momentum(advance(old, begin), scales, s.decay, size, [&](auto decayed) CAME8BIT_LAMBDA {
      for_lanes(size, [&](int in_block, int some) CAME8BIT_LAMBDA {
        const int j = begin + in_block;
        ask_for(grad + begin, in_block, kAhead);
        if (sizeof(MT) == 1 || !coded) ask_for(advance(old, begin), in_block, kAhead);
        const F g = load_some(grad + j, some);
        F w;
        if constexpr (factored) {
          w = precondition(g, row_gain, load_some(col_factor + column + in_block, some));
        } else {
          const F v = full_second_moment(c, grad + j, s.exp_avg_sq + j, some);
          if (s.new_exp_avg_sq != nullptr) store_some(s.new_exp_avg_sq + j, v, some);
          w = precondition_unfactored(g, v, F(c.sign()), F(c.correction2)) * F(c.gain);
        }
        const F m_t = came8bit::momentum(decayed(in_block, some), w);
        store_some(exp_avg + j, m_t, some);
        if (coded || !Beside::kUpdates) store_some(new_w + j, w, some);
        if constexpr (Beside::kUpdates) {
          ask_for(update.param + begin, in_block, kAhead);
          const auto col = [&] { return load_some(update_col + column + in_block, some); };
          update(j, some, update_row, col, m_t, w);
        }
        if constexpr (coded) {
          // Lanes past the end hold zeros, or NaN, which is larger than nothing.
          largest = larger_magnitude(m_t, largest);
          // Those past the end must not count as zeros: short rows would always decay.
          const F stands = factored ? w : g;
          if (some == kLanes) {
            smallest = smaller_magnitude(stands, smallest);
          } else if (count(stands == F(0.0f)) > kLanes - some) {
            smallest = F(0.0f);
          }
        }
      });
    });
    if constexpr (coded) {
      const float lane = largest_lane(largest);
      if (lane > blocks.largest[block]) blocks.largest[block] = lane;
      blocks.decays[block] |= any(smallest == F(0.0f));
    }
  }
}
template <class G, class MT, bool coded, bool factored>
void momentum(const StepConstants& c, const Segment& s, ToEncode blocks) {
  momentum_as<G, MT, coded, factored>(c, s, blocks, Later());
}

// Both at once, of fp32.
template <class MT, bool coded>
void momentum_and_update(const StepConstants& c, const Segment& s, ToEncode blocks) {
  const auto run = [&](auto options) CAME8BIT_LAMBDA {
    momentum_as<float, MT, coded, true>(c, s, blocks, AtOnce<decltype(options)>(c, s, options));
  };
  c.nesterov ? run(Usual<true, false, false>()) : run(Usual<false, false, false>());
}

// Where the update is exactly zero: with a full second moment the gradient itself decides.
template <class G>
CAME8BIT_INLINE M stands_still(const Segment& s, int j, int size) {
  const F zero(0.0f);
  if (s.col_factor != nullptr) return load_some(s.w + j, size) == zero;
  return load_some(static_cast<const G*>(s.grad) + j, size) == zero;
}

template <class G>
void steps(const Segment& s, float* step) {
  for_lanes(s.size, [&](int j, int some) CAME8BIT_LAMBDA {
    const F to_next = select(stands_still<G>(s, j, some), F(kDecayStep), F(kNearestStep));
    store_some(step + j, to_next, some);
  });
}

template <class G>
void forget(const Segment& s, float* kept) {
  for_lanes(s.size, [&](int j, int some) CAME8BIT_LAMBDA {
    const F m_t = load_some(s.exp_avg + j, some);
    store_some(kept + j, select(stands_still<G>(s, j, some), F(0.0f), m_t), some);
  });
}

int agreeing(const float* w, const float* m, int size) {
  int total = 0;
  // Lanes past the end are zero and never counted.
  for_lanes(size, [&](int j, int some) CAME8BIT_LAMBDA {
    total += count(agrees(load_some(m + j, some), load_some(w + j, some)));
  });
  return total;
}

template <class P, bool factored, class Options>
CAME8BIT_INLINE void apply_as(const StepConstants& c, const Segment& s, Options options) {
  const Update<P, factored, Options> update(c, s, options);
  const float *const exp_avg = s.exp_avg, *const new_w = s.w, *const update_col = s.update_col;
  const auto lanes = [&](int j, int some, F row, auto col) CAME8BIT_LAMBDA {
    ask_for(update.param, j, kAhead);
    update(j, some, row, col, load_some(exp_avg + j, some), load_some(new_w + j, some));
  };
  int r = 0;
  if constexpr (factored) {
    if (s.size == 8) {
      const F col = twice(update_col);
      for (; r + 2 <= s.rows; r += 2) {
        lanes(r * 8, kLanes, of_two_rows(s.update_row + r), [&] { return col; });
      }
    }
  }
  for (; r < s.rows; ++r) {
    const F row(factored ? s.update_row[r] : 0.0f);
    for_lanes(s.size, [&](int j, int some) CAME8BIT_LAMBDA {
      lanes(r * s.size + j, some, row, [&] { return load_some(update_col + j, some); });
    });
  }
}

template <class P, bool factored, bool spends>
CAME8BIT_INLINE void apply_usual(const StepConstants& c, const Segment& s) {
  if (c.nesterov) {
    s.random != nullptr ? apply_as<P, factored>(c, s, Usual<true, true, spends>())
                        : apply_as<P, factored>(c, s, Usual<true, false, spends>());
  } else {
    s.random != nullptr ? apply_as<P, factored>(c, s, Usual<false, true, spends>())
                        : apply_as<P, factored>(c, s, Usual<false, false, spends>());
  }
}

template <class P, bool factored>
void apply(const StepConstants& c, const Segment& s) {
  if (c.cautious || !factored) {
    apply_as<P, factored>(c, s,
                          Any{c.nesterov, s.kept != nullptr, c.cautious, s.random != nullptr});
  } else if (s.kept != nullptr) {
    apply_usual<P, factored, true>(c, s);
  } else {
    apply_usual<P, factored, false>(c, s);
  }
}

// --- random bits ------------------------------------------------------------------------------

constexpr int kOfCounter = 8;  // elements
// Vectors of counters that go through the rounds together: each operation waits for the one before.
constexpr int kTogether = 3;
static_assert(kDraw >= kCounters * kOfCounter, "room in the buffer");

// In memory, where each is an operand of one instruction.
struct KeyVectors {
  W k0[kPhiloxRounds], k1[kPhiloxRounds];

  CAME8BIT_INLINE explicit KeyVectors(uint64_t seed) {
    PhiloxKeys keys(seed);
    for (int round = 0; round < kPhiloxRounds; ++round, keys.next()) {
      k0[round] = W(keys.k0);
      k1[round] = W(keys.k1);
    }
  }
};

// Bits for `vectors` times kCounters counters whose upper halves are equal.
template <int vectors>
CAME8BIT_INLINE void draw(const StepConstants& c, const KeyVectors& keys, uint64_t counter,
                          uint16_t* out) {
  W c0[vectors], c1[vectors], c2[vectors], c3[vectors];
  for (int i = 0; i < vectors; ++i) {
    c0[i] = consecutive(counter + static_cast<uint64_t>(i * kCounters));
    c1[i] = W(counter >> 32);
    c2[i] = W(c.index);
    c3[i] = W(c.step);
  }
  const auto round = [&](int r) CAME8BIT_LAMBDA {
    for (int i = 0; i < vectors; ++i) {
      philox_round(c0[i], c1[i], c2[i], c3[i], keys.k0[r], keys.k1[r]);
    }
  };
  // Half of what these do is the same for all counters, and done once.
  round(0);
  round(1);
  CAME8BIT_ROLLED  // else GCC mixes the rounds, and keeps words in memory
      for (int r = 2; r < kPhiloxRounds; ++r) round(r);
  for (int i = 0; i < vectors; ++i) {
    store_words(out + i * kCounters * kOfCounter, c0[i], c1[i], c2[i], c3[i]);
  }
}

const uint16_t* random_bits(const StepConstants& c, uint64_t element, int size, uint16_t* buffer) {
  const KeyVectors keys(c.seed);
  const uint64_t first = element / kOfCounter / kCounters * kCounters;
  const uint64_t last = (element + static_cast<uint64_t>(size) - 1) / kOfCounter;
  uint16_t* out = buffer;
  for (uint64_t counter = first; counter <= last;) {
    const uint64_t together = counter + kTogether * kCounters - 1;
    const bool many = together <= last && together >> 32 == counter >> 32;
    many ? draw<kTogether>(c, keys, counter, out) : draw<1>(c, keys, counter, out);
    const int drawn = (many ? kTogether : 1) * kCounters;
    counter += drawn;
    out += drawn * kOfCounter;
  }
  return buffer + (element - first * kOfCounter);
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
