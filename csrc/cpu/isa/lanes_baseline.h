// Sixteen lanes in plain C++, for every processor. With GCC and Clang as four 128-bit vectors
// (their vector extension), elsewhere as sixteen scalars.
#pragma once

#include "../../quant.h"
#include "../../rounding.h"

namespace came8bit {
namespace baseline {

constexpr bool kManyRegisters = false;

#if defined(__GNUC__)
constexpr int kWide = 4;
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
typedef Int Bool;  // 0 or -1
CAME8BIT_INLINE Float splat(float x) {
  return Float{x, x, x, x};
}
CAME8BIT_INLINE Int splat(int32_t x) {
  return Int{x, x, x, x};
}
CAME8BIT_INLINE Bool all_bits(Bool condition) {
  return condition;
}
#else
constexpr int kWide = 1;
typedef float Float;
typedef int32_t Int;
typedef int32_t Bool;
CAME8BIT_INLINE Float splat(float x) {
  return x;
}
CAME8BIT_INLINE Int splat(int32_t x) {
  return x;
}
CAME8BIT_INLINE Bool all_bits(bool condition) {
  return -static_cast<int32_t>(condition);
}
#endif
constexpr int kParts = 16 / kWide;

struct F {
  Float v[kParts];
  F() = default;
  CAME8BIT_INLINE explicit F(float x) {
    for (Float& part : v) part = splat(x);
  }
};

struct I {
  Int v[kParts];
  I() = default;
  CAME8BIT_INLINE explicit I(int32_t x) {
    for (Int& part : v) part = splat(x);
  }
};

// Eight lanes of 64 bits, for random numbers.
struct W {
  uint64_t v[8];
  W() = default;
  CAME8BIT_INLINE explicit W(uint64_t x) {
    for (uint64_t& lane : v) lane = x;
  }
};
constexpr int kCounters = 8;

struct M {
  Bool v[kParts];
};

template <class To, class From>
CAME8BIT_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, another type");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Defines `R signature` part by part, or lane by lane through an array.
#define CAME8BIT_PARTS(R, signature, expression)              \
  CAME8BIT_INLINE R signature {                               \
    R out;                                                    \
    for (int i = 0; i < kParts; ++i) out.v[i] = (expression); \
    return out;                                               \
  }
#define CAME8BIT_LANES(R, Lane, signature, expression)    \
  CAME8BIT_INLINE R signature {                           \
    Lane lanes[16];                                       \
    for (int i = 0; i < 16; ++i) lanes[i] = (expression); \
    R out;                                                \
    memcpy(&out, lanes, sizeof out);                      \
    return out;                                           \
  }

CAME8BIT_PARTS(F, operator+(F a, F b), a.v[i] + b.v[i])
CAME8BIT_PARTS(F, operator-(F a, F b), a.v[i] - b.v[i])
CAME8BIT_PARTS(F, operator*(F a, F b), a.v[i] * b.v[i])
CAME8BIT_PARTS(F, operator/(F a, F b), a.v[i] / b.v[i])
CAME8BIT_PARTS(M, operator<(F a, F b), all_bits(a.v[i] < b.v[i]))
CAME8BIT_PARTS(M, operator<=(F a, F b), all_bits(a.v[i] <= b.v[i]))
CAME8BIT_PARTS(M, operator>(F a, F b), all_bits(a.v[i] > b.v[i]))
CAME8BIT_PARTS(M, operator==(F a, F b), all_bits(a.v[i] == b.v[i]))
CAME8BIT_PARTS(M, operator<(I a, I b), all_bits(a.v[i] < b.v[i]))
CAME8BIT_PARTS(M, operator==(I a, I b), all_bits(a.v[i] == b.v[i]))
CAME8BIT_PARTS(M, operator&(M a, M b), a.v[i] & b.v[i])
CAME8BIT_PARTS(M, operator|(M a, M b), a.v[i] | b.v[i])
CAME8BIT_PARTS(I, operator&(I a, I b), a.v[i] & b.v[i])
CAME8BIT_PARTS(I, operator|(I a, I b), a.v[i] | b.v[i])
CAME8BIT_PARTS(I, operator^(I a, I b), a.v[i] ^ b.v[i])
CAME8BIT_PARTS(I, bits(F a), reinterpret<Int>(a.v[i]))
CAME8BIT_PARTS(F, from_bits(I a), reinterpret<Float>(a.v[i]))
CAME8BIT_PARTS(I, select(M m, I yes, I no), (m.v[i] & yes.v[i]) | (~m.v[i] & no.v[i]))

CAME8BIT_INLINE F select(M m, F yes, F no) {
  return from_bits(select(m, bits(yes), bits(no)));
}
CAME8BIT_INLINE F abs(F a) {
  return from_bits(bits(a) & I(0x7fffffff));
}
// The larger; `b` where `a` is NaN.
CAME8BIT_INLINE F larger(F a, F b) {
  return select(a > b, a, b);
}
// The larger, the smaller of |a| and b >= 0; b where `a` is NaN.
CAME8BIT_INLINE F larger_magnitude(F a, F b) {
  return larger(abs(a), b);
}
CAME8BIT_INLINE F smaller_magnitude(F a, F b) {
  return select(abs(a) < b, abs(a), b);
}

// Lane access for what the vector extension does not have.
template <class Lane, class V>
struct Lanes {
  Lane v[16];
  explicit CAME8BIT_INLINE Lanes(V x) { memcpy(v, &x, sizeof v); }
  CAME8BIT_INLINE Lane operator[](int i) const { return v[i]; }
};
typedef Lanes<float, F> FloatLanes;
typedef Lanes<int32_t, I> IntLanes;
typedef Lanes<uint32_t, I> UintLanes;

CAME8BIT_LANES(F, float, sqrt_lanes(FloatLanes a), came8bit::sqrt(a[i]))
CAME8BIT_LANES(F, float, float_lanes(IntLanes a), static_cast<float>(a[i]))
CAME8BIT_LANES(I, uint32_t, add_lanes(UintLanes a, UintLanes b), a[i] + b[i])
template <int n>
CAME8BIT_LANES(I, uint32_t, shift_lanes(UintLanes a), a[i] >> n)
// NaN and what does not fit give INT32_MIN.
CAME8BIT_LANES(I, int32_t, truncate_lanes(FloatLanes a),
               came8bit::abs(a[i]) < 0x1p31f ? static_cast<int32_t>(a[i]) : INT32_MIN)

CAME8BIT_INLINE F sqrt(F a) {
  return sqrt_lanes(FloatLanes(a));
}
CAME8BIT_INLINE F to_float(I a) {
  return float_lanes(IntLanes(a));
}
CAME8BIT_INLINE I truncate(F a) {
  return truncate_lanes(FloatLanes(a));
}
CAME8BIT_INLINE F rough_root(F a) {
  return sqrt(a);
}
CAME8BIT_INLINE I operator+(I a, I b) {
  return add_lanes(UintLanes(a), UintLanes(b));
}
template <int n>
CAME8BIT_INLINE I shift_right(I a, Shift<n>) {
  return shift_lanes<n>(UintLanes(a));
}
// a + 1 where m is true.
CAME8BIT_INLINE I increment_if(M m, I a) {
  return a + select(m, I(1), I(0));
}
// -a where `sign` is negative; 0 may stay or not where `sign` is 0. INT32_MIN stays.
CAME8BIT_INLINE I with_sign(I a, F sign) {
  const M negative = bits(sign) < I(0);
  return increment_if(negative, a ^ select(negative, I(-1), I(0)));
}
// Bit i is lane i.
CAME8BIT_INLINE unsigned mask(M m) {
  const IntLanes lanes(reinterpret<I>(m));
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(lanes[i] & 1) << i;
  return bits;
}
CAME8BIT_INLINE int bit_count(unsigned x) {
  int total = 0;
  for (; x != 0; x &= x - 1) ++total;
  return total;
}
CAME8BIT_INLINE bool any(M m) {
  return mask(m) != 0;
}
CAME8BIT_INLINE bool any_nan(F a) {
  return mask(a == a) != (1u << kLanes) - 1;
}
CAME8BIT_INLINE W multiply(W a, uint32_t factor) {
  for (uint64_t& lane : a.v) lane = came8bit::multiply(lane, factor);
  return a;
}
CAME8BIT_INLINE W high_half(W a) {
  for (uint64_t& lane : a.v) lane = came8bit::high_half(lane);
  return a;
}
CAME8BIT_INLINE W exclusive_or(W a, W b, W c) {
  for (int i = 0; i < 8; ++i) a.v[i] = came8bit::exclusive_or(a.v[i], b.v[i], c.v[i]);
  return a;
}

CAME8BIT_INLINE F load(const float* p) {
  F out;
  memcpy(&out, p, sizeof out);
  return out;
}
CAME8BIT_INLINE bool one_of_64_is(const int8_t* p, int8_t code) {
  bool found = false;
  for (int i = 0; i < 64; ++i) found |= p[i] == code;
  return found;
}
CAME8BIT_INLINE I load(const int32_t* p) {
  return bits(load(reinterpret_cast<const float*>(p)));
}
CAME8BIT_LANES(F, uint32_t, load(const Bf16* p), static_cast<uint32_t>(p[i].bits) << 16)
CAME8BIT_LANES(F, float, load(const Half* p), half_to_float(p[i]))
CAME8BIT_LANES(I, int32_t, load(const int8_t* p), p[i])
CAME8BIT_LANES(I, int32_t, load(const uint16_t* p), p[i])
#undef CAME8BIT_PARTS

// Eight values in the first lanes, the others zero.
template <class T>
CAME8BIT_INLINE auto load_eight(const T* p) -> decltype(load(p)) {
  T lanes[16] = {};
  memcpy(lanes, p, 8 * sizeof(T));
  return load(lanes);
}

CAME8BIT_INLINE void store(float* p, F a) {
  memcpy(p, &a, sizeof a);
}
CAME8BIT_INLINE void store(int32_t* p, I a) {
  store(reinterpret_cast<float*>(p), from_bits(a));
}
CAME8BIT_INLINE void store(Half* p, F a) {
  const FloatLanes lanes(a);
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(lanes[i]);
}
// The upper halves of the lanes.
CAME8BIT_INLINE void store(Bf16* p, I a) {
  const UintLanes lanes(a);
  for (int i = 0; i < 16; ++i) p[i].bits = static_cast<uint16_t>(lanes[i] >> 16);
}
// Saturates.
CAME8BIT_INLINE void store(int8_t* p, I a) {
  const IntLanes lanes(a);
  for (int i = 0; i < 16; ++i) {
    const int32_t x = lanes[i];
    p[i] = static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  }
}
// Sixteen packed codes of `n` bits in the lowest bits of the lanes; above them is rubbish.
template <int n>
CAME8BIT_LANES(I, int32_t, load_packed(const uint8_t* p), p[i * n / 8] >> i * n % 8)
// Of sixteen values those that the lowest four bits of the lanes say.
CAME8BIT_LANES(F, float, look_up(FloatLanes value, IntLanes index), value[index[i] & 15])
CAME8BIT_INLINE F look_up(F value, I index) {
  return look_up(FloatLanes(value), IntLanes(index));
}
#undef CAME8BIT_LANES
// Packs 64 codes of 4 or 2 bits, the lowest bits of bytes.
template <int n>
CAME8BIT_INLINE void pack_64(const int8_t* wide, uint8_t* codes) {
  for (int i = 0; i < 8 * n; ++i) codes[i] = packed_byte<n>(wide + i * 8 / n);
}
// 64 codes; saturates.
CAME8BIT_INLINE void store_codes(int8_t* p, I a, I b, I c, I d) {
  store(p, a);
  store(p + 16, b);
  store(p + 32, c);
  store(p + 48, d);
}
// Levels of 4 bits of 64 elements, from what kLevels4 is for: 4*square with the sign of the
// element. Returns whether none is NaN, which is INT32_MIN.
CAME8BIT_INLINE bool store_levels4(int8_t* p, I a, I b, I c, I d) {
  const I all[4] = {a, b, c, d};
  int32_t lanes[64];
  memcpy(lanes, all, sizeof lanes);
  for (int i = 0; i < 64; ++i) {
    if (lanes[i] == INT32_MIN) return false;
    const bool negative = lanes[i] < 0;
    const int8_t level = kLevels4[((negative ? -lanes[i] : lanes[i]) + 7) / 8];
    p[i] = static_cast<int8_t>(negative ? -level : level);
  }
  return true;
}
// The counters that philox is given in its lanes, such that its words are stored in order.
CAME8BIT_INLINE W consecutive(uint64_t first) {
  W out;
  for (uint64_t i = 0; i < 8; ++i) out.v[i] = first + i;
  return out;
}
// Four 32-bit words for each of eight counters, the low half of a word first.
CAME8BIT_INLINE void store_words(uint16_t* p, W w0, W w1, W w2, W w3) {
  const W* words[4] = {&w0, &w1, &w2, &w3};
  for (int i = 0; i < 8; ++i) {
    for (int w = 0; w < 4; ++w) {
      p[i * 8 + w * 2] = static_cast<uint16_t>(words[w]->v[i]);
      p[i * 8 + w * 2 + 1] = static_cast<uint16_t>(words[w]->v[i] >> 16);
    }
  }
}

// 16 -> 8 -> 4 -> 2 -> 1, adding the upper half to the lower.
CAME8BIT_INLINE float sum_lanes(F a) {
  FloatLanes lanes(a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes.v[i] = lanes[i] + lanes[i + half];
  }
  return lanes[0];
}
CAME8BIT_INLINE float largest_lane(F a) {
  const FloatLanes lanes(a);
  float largest = lanes[0];
  for (float lane : lanes.v) largest = lane > largest ? lane : largest;
  return largest;
}

// Rows of eight, two in a vector. `of_two_rows`: p[0] in the lower half of the lanes, p[1] in the
// upper; `twice`: p[0 ... 7] in both.
CAME8BIT_INLINE F of_two_rows(const float* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = p[i / 8];
  return load(lanes);
}
CAME8BIT_INLINE F halves(const float* lower, const float* upper) {
  float lanes[16];
  memcpy(lanes, lower, 8 * sizeof(float));
  memcpy(lanes + 8, upper, 8 * sizeof(float));
  return load(lanes);
}
CAME8BIT_INLINE F twice(const float* p) {
  return halves(p, p);
}
CAME8BIT_INLINE F lower_halves(F x, F y) {
  return halves(FloatLanes(x).v, FloatLanes(y).v);
}
CAME8BIT_INLINE F upper_halves(F x, F y) {
  return halves(FloatLanes(x).v + 8, FloatLanes(y).v + 8);
}
// op over the lanes of each half of x and of y, in the order of sum_lanes.
template <class Op>
CAME8BIT_INLINE void over_eights(F x, F y, Op op, float* out) {
  float rows[32], lower[16] = {}, upper[16] = {};
  store(rows, x);
  store(rows + 16, y);
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < 4 * half; ++i) {
      const int lane = i / half * 2 * half + i % half;
      lower[i] = rows[lane];
      upper[i] = rows[lane + half];
    }
    store(rows, op(load(lower), load(upper)));
  }
  memcpy(out, rows, 4 * sizeof(float));
}

}  // namespace baseline
}  // namespace came8bit
