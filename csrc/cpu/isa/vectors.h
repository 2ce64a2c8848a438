// Vectors of any length: loads, stores, sums, and the statistics of rows and columns.
#pragma once

namespace came8bit {
namespace CAME8BIT_ISA {
namespace {

constexpr int kLineBytes = 64;
// How many elements ahead sweep C, and all sweeps of short rows, ask for memory.
constexpr int kAhead = 1024;

CAME8BIT_INLINE int count(M m) {
  return bit_count(mask(m));
}

// Asks for memory `ahead` elements after p + j, once per cache line.
template <class T>
CAME8BIT_INLINE void ask_for(const T* p, int j, int64_t ahead) {
  if (j * sizeof(T) % kLineBytes == 0) prefetch(p + j + ahead);
}

template <class T>
CAME8BIT_INLINE auto load_some(const T* p, int size) -> decltype(load(p)) {
  return size >= kLanes ? load(p) : load_part(p, size);
}

template <class T, class V>
CAME8BIT_INLINE void store_some(T* p, V value, int size) {
  size >= kLanes ? store(p, value) : store_part(p, value, size);
}

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
}  // namespace came8bit
