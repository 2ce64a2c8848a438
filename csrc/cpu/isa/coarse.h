// Sweep C with coarse momentum: the update comes after the encoding, and spends what that forgets.
#pragma once

#include "apply.h"

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

template <class G, bool factored>
float coarse_momentum(const StepConstants& constants, const CoarseSegment& segment) {
  const CoarseSegment s = segment;
  const Broadcast c(constants);
  const F row_gain(s.row_gain), zero(0.0f);
  F largest(0.0f);
  for (int j = 0; j < s.size; j += kLanes) {
    const int size = s.size - j < kLanes ? s.size - j : kLanes;
    const F g = load_some(static_cast<const G*>(s.grad) + j, size);
    F w;
    if constexpr (factored) {
      w = precondition(g, row_gain, load_some(s.col_factor + j, size));
    } else {
      const F v = full_second_moment(g, load_some(s.exp_avg_sq + j, size), c);
      w = precondition_unfactored(g, v, c.sign, c.correction2) * c.gain;
    }
    const F m_t = momentum(load_some(s.exp_avg + j, size), w);
    const F kept = select((factored ? w : g) == zero, zero, m_t);
    store_some(s.w + j, w, size);
    store_some(s.exp_avg + j, m_t, size);
    store_some(s.kept + j, kept, size);
    // Lanes past the end may hold NaN in `w`, which is larger than nothing.
    largest = larger(abs(kept), largest);
  }
  return largest_lane(largest);
}

template <class P, class G, bool factored>
void coarse_apply(const StepConstants& constants, const CoarseSegment& segment) {
  const CoarseSegment s = segment;
  const Broadcast c(constants);
  const F update_row(s.update_row), spent(constants.spent);
  const bool cautious = constants.cautious, nesterov = constants.nesterov;
  for (int j = 0; j < s.size; j += kLanes) {
    const int size = s.size - j < kLanes ? s.size - j : kLanes;
    const F w = load_some(s.w + j, size), m_t = load_some(s.exp_avg + j, size);
    const F ahead = nesterov ? look_ahead(m_t, w, c.beta1) : m_t;
    const F direction = spend(ahead, m_t, load_some(s.kept + j, size), spent);
    F update;
    if constexpr (factored) {
      update = precondition(direction, update_row, load_some(s.update_col + j, size));
    } else {
      update = direction * c.scale;
      const F g = load_some(static_cast<const G*>(s.grad) + j, size);
      store_some(s.exp_avg_sq + j, full_second_moment(g, load_some(s.exp_avg_sq + j, size), c),
                 size);
    }
    if (cautious) update = select(agrees(m_t, w), update, F(0.0f));
    P* p = static_cast<P*>(s.param) + j;
    store_param(p, decay_and_apply(load_some(p, size), c.shrink, update),
                s.random ? s.random + j : nullptr, size);
  }
}

int coarse_agreeing(const float* w, const float* m, int size) {
  int total = 0;
  for (int j = 0; j < size; j += kLanes) {
    const int some = size - j < kLanes ? size - j : kLanes;
    total += count(agrees(load_some(m + j, some), load_some(w + j, some)));
  }
  return total;
}

}  // namespace
}  // namespace CAME8BIT_ISA
}  // namespace came8bit
