// What stands between the sweeps: vectors of row and column statistics, and the table of the
// instruction set. Included once per instruction set, last.
#pragma once

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

// Lane sum of term(j, size) over [0, size): chunks of kChunk, added in order.
template <class Term>
CAME8BIT_INLINE float chunked_sum(int64_t size, Term term) {
  float total = 0.0f;
  for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
    const int64_t end = size - chunk < kChunk ? size : chunk + kChunk;
    F lanes(0.0f);
    int64_t j = chunk;
    for (; j + kLanes <= end; j += kLanes) lanes = lanes + term(j, kLanes);
    if (j < end) lanes = lanes + term(j, static_cast<int>(end - j));
    total = total + sum_lanes(lanes);
  }
  return total;
}

float lane_sum(const float* x, int64_t size) {
  return chunked_sum(size,
                     [&](int64_t j, int some) CAME8BIT_LAMBDA { return load_some(x + j, some); });
}

float lane_sum_of_ratios(const float* x, const float* y, int64_t size) {
  return chunked_sum(size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    if (some == kLanes) return load(x + j) / load(y + j);
    float divisor[kLanes];
    for (float& one : divisor) one = 1.0f;  // lanes past the end: 0/1
    memcpy(divisor, y + j, static_cast<size_t>(some) * sizeof(float));
    return load_part(x + j, some) / load(divisor);
  });
}

template <class G>
float sum_g2(const void* grad, int size) {
  const G* g = static_cast<const G*>(grad);
  return chunked_sum(size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F x = load_some(g + j, some);
    return x * x;
  });
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

// out[j] = value(j, size) for whole vectors.
template <class Value>
CAME8BIT_INLINE void fill(float* out, int64_t size, Value value) {
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) store(out + j, value(j, kLanes));
  const int rest = static_cast<int>(size - j);
  if (rest > 0) store_some(out + j, value(j, rest), rest);
}

void add(float* sum, const float* x, int64_t size) {
  fill(sum, size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    return load_some(sum + j, some) + load_some(x + j, some);
  });
}

void scale(float* x, int64_t size, float factor) {
  fill(x, size,
       [&](int64_t j, int some) CAME8BIT_LAMBDA { return load_some(x + j, some) * F(factor); });
}

void second_moment_ema(float* fresh, const float* old, const float* sum, int64_t size, float count,
                       float beta2, float one_minus_beta2, float eps1) {
  fill(fresh, size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F mean = mean_square(load_some(sum + j, some), F(count), F(eps1));
    return ema(load_some(old + j, some), F(beta2), mean, F(one_minus_beta2));
  });
}

void row_factors(float* out, const float* r, int64_t size, float root_of_mean, float scale) {
  fill(out, size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    return row_factor(load_some(r + j, some), F(root_of_mean), F(scale));
  });
}

void col_factors(float* out, const float* c, int64_t size, float correction) {
  fill(out, size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    return column_factor(load_some(c + j, some), F(correction));
  });
}

void instability_ema(float* average, const float* d2, const float* ud, const float* u2,
                     int64_t size, float delta, float count, float beta1_squared, float eps2,
                     float beta3, float one_minus_beta3) {
  const F two_delta(delta * 2.0f), delta_squared(delta * delta);
  fill(average, size, [&](int64_t j, int some) CAME8BIT_LAMBDA {
    const F mean =
        mean_instability(load_some(d2 + j, some), load_some(ud + j, some), load_some(u2 + j, some),
                         two_delta, delta_squared, F(count), F(beta1_squared), F(eps2));
    return ema(load_some(average + j, some), F(beta3), mean, F(one_minus_beta3));
  });
}

}  // namespace
}  // namespace CAME8BIT_ISA

#define CAME8BIT_ROW(f, P, is8bit, factored) \
  {f<P, float, is8bit, factored>, f<P, Bf16, is8bit, factored>, f<P, Half, is8bit, factored>}
#define CAME8BIT_TABLE(f, is8bit, factored)                                           \
  {CAME8BIT_ROW(f, float, is8bit, factored), CAME8BIT_ROW(f, Bf16, is8bit, factored), \
   CAME8BIT_ROW(f, Half, is8bit, factored)}
#define CAME8BIT_AGREEING(is8bit, factored)                             \
  {agreeing<float, is8bit, factored>, agreeing<Bf16, is8bit, factored>, \
   agreeing<Half, is8bit, factored>}

// Defines the table of this instruction set as `kernels_<isa>`.
#define CAME8BIT_DEFINE_KERNELS(name)                                              \
  const Kernels name = [] {                                                        \
    using namespace CAME8BIT_ISA;                                                  \
    return Kernels{                                                                \
        {second_moment<float>, second_moment<Bf16>, second_moment<Half>},          \
        {residual<float, int8_t>, residual<Bf16, int8_t>, residual<Half, int8_t>}, \
        {residual<float, float>, residual<Bf16, float>, residual<Half, float>},    \
        CAME8BIT_TABLE(apply, true, true),                                         \
        CAME8BIT_TABLE(apply, false, true),                                        \
        CAME8BIT_TABLE(apply, true, false),                                        \
        CAME8BIT_TABLE(apply, false, false),                                       \
        {steps<float>, steps<Bf16>, steps<Half>},                                  \
        CAME8BIT_AGREEING(true, true),                                             \
        CAME8BIT_AGREEING(false, true),                                            \
        CAME8BIT_AGREEING(true, false),                                            \
        CAME8BIT_AGREEING(false, false),                                           \
        {sum_g2<float>, sum_g2<Bf16>, sum_g2<Half>},                               \
        {sum_u2<float>, sum_u2<Bf16>, sum_u2<Half>},                               \
        random_bits,                                                               \
        largest_magnitude,                                                         \
        CAME8BIT_ISA::encode,                                                      \
        CAME8BIT_ISA::decode,                                                      \
        lane_sum,                                                                  \
        lane_sum_of_ratios,                                                        \
        add,                                                                       \
        scale,                                                                     \
        second_moment_ema,                                                         \
        row_factors,                                                               \
        col_factors,                                                               \
        instability_ema,                                                           \
    };                                                                             \
  }()

}  // namespace came8bit
