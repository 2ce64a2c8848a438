// Sixteen lanes in one 512-bit register. Needs AVX-512 F, BW, DQ, VL.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from an undefined register on purpose and then warn of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "../../quant.h"

namespace came8bit {
namespace avx512 {

constexpr bool kManyRegisters = true;
struct F {
  __m512 v;
  F() = default;
  CAME8BIT_INLINE F(__m512 x) : v(x) {}
  CAME8BIT_INLINE explicit F(float x) : v(_mm512_set1_ps(x)) {}
};

struct I {
  __m512i v;
  I() = default;
  CAME8BIT_INLINE I(__m512i x) : v(x) {}
  CAME8BIT_INLINE explicit I(int32_t x) : v(_mm512_set1_epi32(x)) {}
};

// Eight lanes of 64 bits, for random numbers.
struct W {
  __m512i v;
  W() = default;
  CAME8BIT_INLINE W(__m512i x) : v(x) {}
  CAME8BIT_INLINE explicit W(uint64_t x) : v(_mm512_set1_epi64(static_cast<long long>(x))) {}
};
constexpr int kCounters = 8;

struct M {
  __mmask16 v;
};

CAME8BIT_INLINE F operator+(F a, F b) {
  return _mm512_add_ps(a.v, b.v);
}
CAME8BIT_INLINE F operator-(F a, F b) {
  return _mm512_sub_ps(a.v, b.v);
}
CAME8BIT_INLINE F operator*(F a, F b) {
  return _mm512_mul_ps(a.v, b.v);
}
CAME8BIT_INLINE F operator/(F a, F b) {
  return _mm512_div_ps(a.v, b.v);
}
CAME8BIT_INLINE F sqrt(F a) {
  return _mm512_sqrt_ps(a.v);
}
CAME8BIT_INLINE F abs(F a) {
  return _mm512_abs_ps(a.v);
}
CAME8BIT_INLINE M operator<(F a, F b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
CAME8BIT_INLINE M operator<=(F a, F b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
CAME8BIT_INLINE M operator>(F a, F b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
}
CAME8BIT_INLINE M operator==(F a, F b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
CAME8BIT_INLINE M operator<(I a, I b) {
  return {_mm512_cmplt_epi32_mask(a.v, b.v)};
}
CAME8BIT_INLINE M operator==(I a, I b) {
  return {_mm512_cmpeq_epi32_mask(a.v, b.v)};
}
CAME8BIT_INLINE M operator&(M a, M b) {
  return {static_cast<__mmask16>(a.v & b.v)};
}
CAME8BIT_INLINE M operator|(M a, M b) {
  return {static_cast<__mmask16>(a.v | b.v)};
}
CAME8BIT_INLINE F select(M m, F yes, F no) {
  return _mm512_mask_blend_ps(m.v, no.v, yes.v);
}
CAME8BIT_INLINE I select(M m, I yes, I no) {
  return _mm512_mask_blend_epi32(m.v, no.v, yes.v);
}
// Bit i is lane i.
CAME8BIT_INLINE unsigned mask(M m) {
  return m.v;
}
CAME8BIT_INLINE int bit_count(unsigned x) {
  return _mm_popcnt_u32(x);
}
// The larger; `b` where `a` is NaN.
CAME8BIT_INLINE F larger(F a, F b) {
  return _mm512_max_ps(a.v, b.v);
}
// The larger, the smaller of |a| and b >= 0; b where `a` is a quiet NaN.
CAME8BIT_INLINE F larger_magnitude(F a, F b) {
  return _mm512_range_ps(a.v, b.v, 0b1011);
}
CAME8BIT_INLINE F smaller_magnitude(F a, F b) {
  return _mm512_min_ps(abs(a).v, b.v);
}

CAME8BIT_INLINE I operator+(I a, I b) {
  return _mm512_add_epi32(a.v, b.v);
}
CAME8BIT_INLINE I operator&(I a, I b) {
  return _mm512_and_si512(a.v, b.v);
}
CAME8BIT_INLINE I operator|(I a, I b) {
  return _mm512_or_si512(a.v, b.v);
}
CAME8BIT_INLINE I operator^(I a, I b) {
  return _mm512_xor_si512(a.v, b.v);
}
template <int n>
CAME8BIT_INLINE I shift_right(I a, Shift<n>) {
  return _mm512_srli_epi32(a.v, n);
}
CAME8BIT_INLINE I bits(F a) {
  return _mm512_castps_si512(a.v);
}
CAME8BIT_INLINE F from_bits(I a) {
  return _mm512_castsi512_ps(a.v);
}
CAME8BIT_INLINE F to_float(I a) {
  return _mm512_cvtepi32_ps(a.v);
}
// NaN and what does not fit give INT32_MIN.
CAME8BIT_INLINE I truncate(F a) {
  return _mm512_cvttps_epi32(a.v);
}
// a + 1 where m is true.
CAME8BIT_INLINE I increment_if(M m, I a) {
  return _mm512_mask_add_epi32(a.v, m.v, a.v, _mm512_set1_epi32(1));
}
// -a where `sign` is negative; 0 may stay or not where `sign` is 0. INT32_MIN stays.
CAME8BIT_INLINE I with_sign(I a, F sign) {
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(sign.v));
  return _mm512_mask_sub_epi32(a.v, negative, _mm512_setzero_si512(), a.v);
}
CAME8BIT_INLINE bool any(M m) {
  return m.v != 0;
}
CAME8BIT_INLINE bool any_nan(F a) {
  return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0;
}
// Square root of 0 ... 2^14 with an error below 0.05; NaN for NaN.
CAME8BIT_INLINE F rough_root(F a) {
  return _mm512_mul_ps(a.v, _mm512_rsqrt14_ps(_mm512_max_ps(_mm512_set1_ps(1e-20f), a.v)));
}
CAME8BIT_INLINE W multiply(W a, uint32_t factor) {
  return _mm512_mul_epu32(a.v, _mm512_set1_epi64(factor));
}
CAME8BIT_INLINE W high_half(W a) {
  return _mm512_srli_epi64(a.v, 32);
}
CAME8BIT_INLINE W exclusive_or(W a, W b, W c) {
  return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96);
}

CAME8BIT_INLINE F load(const float* p) {
  return _mm512_loadu_ps(p);
}
CAME8BIT_INLINE F load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
CAME8BIT_INLINE F load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CAME8BIT_INLINE I load(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CAME8BIT_INLINE bool one_of_64_is(const int8_t* p, int8_t code) {
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(p), _mm512_set1_epi8(code)) != 0;
}
CAME8BIT_INLINE I load(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
CAME8BIT_INLINE I load(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CAME8BIT_INLINE void store(float* p, F a) {
  _mm512_storeu_ps(p, a.v);
}
CAME8BIT_INLINE void store(int32_t* p, I a) {
  _mm512_storeu_si512(p, a.v);
}
CAME8BIT_INLINE void store(Half* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The upper halves of the lanes.
CAME8BIT_INLINE void store(Bf16* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}
// Saturates.
CAME8BIT_INLINE void store(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

// The first `size` lanes, the others zero; what lies behind them in memory is not touched. Eight,
// as of adapters of rank 8, go without masks: stores with one are slow, and not at hand for a load
// that follows.
CAME8BIT_INLINE __mmask16 first(int size) {
  return static_cast<__mmask16>((1u << size) - 1);
}
CAME8BIT_INLINE __m256i load_words(const void* p, int size) {
  if (size == 8) return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm256_maskz_loadu_epi16(first(size), p);
}
CAME8BIT_INLINE F load_part(const float* p, int size) {
  if (size == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
  return _mm512_maskz_loadu_ps(first(size), p);
}
CAME8BIT_INLINE F load_part(const Bf16* p, int size) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p, size)), 16));
}
CAME8BIT_INLINE F load_part(const Half* p, int size) {
  return _mm512_cvtph_ps(load_words(p, size));
}
CAME8BIT_INLINE I load_part(const uint16_t* p, int size) {
  return _mm512_cvtepu16_epi32(load_words(p, size));
}
CAME8BIT_INLINE I load_part(const int8_t* p, int size) {
  if (size == 8) {
    return _mm512_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(size), p));
}
CAME8BIT_INLINE void store_words(void* p, __m256i words, int size) {
  if (size == 8) return _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(words));
  _mm256_mask_storeu_epi16(p, first(size), words);
}
CAME8BIT_INLINE void store_part(float* p, F a, int size) {
  if (size == 8) return _mm256_storeu_ps(p, _mm512_castps512_ps256(a.v));
  _mm512_mask_storeu_ps(p, first(size), a.v);
}
CAME8BIT_INLINE void store_part(Bf16* p, I a, int size) {
  store_words(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)), size);
}
CAME8BIT_INLINE void store_part(Half* p, F a, int size) {
  store_words(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), size);
}
CAME8BIT_INLINE void store_part(int8_t* p, I a, int size) {
  const __m128i codes = _mm512_cvtsepi32_epi8(a.v);
  if (size == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), codes);
  _mm_mask_storeu_epi8(p, first(size), codes);
}
// Sixteen packed codes of `n` bits in the lowest bits of the lanes; above them is rubbish.
template <int n>
CAME8BIT_INLINE I load_packed(const uint8_t* p) {
  int32_t words[2];
  memcpy(words, p, 2 * n);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i shift = _mm512_mullo_epi32(lane, _mm512_set1_epi32(n));
  if (n == 4) {
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
    return _mm512_srlv_epi32(both, _mm512_and_si512(shift, _mm512_set1_epi32(31)));
  }
  return _mm512_srlv_epi32(_mm512_set1_epi32(words[0]), shift);
}
// Of sixteen values those that the lowest four bits of the lanes say.
CAME8BIT_INLINE F look_up(F value, I index) {
  return _mm512_permutexvar_ps(index.v, value.v);
}
// Packs 64 codes of 4 or 2 bits, the lowest bits of bytes.
template <int n>
CAME8BIT_INLINE void pack_64(const int8_t* wide, uint8_t* codes) {
  const __m512i bytes = _mm512_and_si512(_mm512_loadu_si512(wide), _mm512_set1_epi8((1 << n) - 1));
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(1 | 256 << n));
  if (n == 4) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi16_epi8(pairs));
  }
  const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 16 << 16));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(fours));
}
// Packs work within 128 bits, and of a, b, c, d leave the 32-bit groups in the order a0 b0 c0 d0 a1
// ...: with this they come in order.
CAME8BIT_INLINE __m512i order_of_packs() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
// 64 lanes as bytes, which saturate, so that signs stay.
CAME8BIT_INLINE __m512i to_bytes(I a, I b, I c, I d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  return _mm512_permutexvar_epi32(order_of_packs(), _mm512_packs_epi16(ab, cd));
}
CAME8BIT_INLINE void store_codes(int8_t* p, I a, I b, I c, I d) {
  _mm512_storeu_si512(p, to_bytes(a, b, c, d));
}
// The same, to nearest (quant.h), of 64 elements x from their squares. Returns whether all is good:
// none is NaN, and no square is 0.
CAME8BIT_INLINE bool store_nearest(int8_t* p, const F* x, const F* s) {
  constexpr float kUnits = 0x1p23f;  // a root that is added to it, cut, stands in the lowest bits
  constexpr int kCut = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  I guess[4];
  __mmask64 reached = 0;
  for (int i = 0; i < 4; ++i) {
    const F root = s[i] * F(_mm512_rsqrt14_ps(s[i].v));
    const F units = _mm512_add_round_ps(root.v, F(kUnits).v, kCut);
    guess[i] = bits(units);
    const M next = square_of_next(units, F(kNearestStep - kUnits)) <= s[i];
    reached |= static_cast<__mmask64>(next.v) << 16 * i;
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i even = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x40004)),
                                        _mm512_set1_epi32(0x20000));  // of 64 words
  const __m512i ab = _mm512_permutex2var_epi16(guess[0].v, even, guess[1].v);
  const __m512i cd = _mm512_permutex2var_epi16(guess[2].v, even, guess[3].v);
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  __m512i code = _mm512_permutexvar_epi64(in_order, _mm512_packs_epi16(ab, cd));
  code = _mm512_mask_add_epi8(code, reached, code, _mm512_set1_epi8(1));
  const __m512i signs = to_bytes(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
  code = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), code);
  _mm512_storeu_si512(p, code);
  const I all = (guess[0] | guess[1]) | (guess[2] | guess[3]);
  return mask((all & bits(F(INFINITY))) == bits(F(kUnits))) == 0xffff;  // of NaN all bits are set
}
// Levels of 4 bits of 64 elements, from what kLevels4 is for: 4*square with the sign of the
// element. Returns whether none is NaN, which is INT32_MIN.
CAME8BIT_INLINE bool store_levels4(int8_t* p, I a, I b, I c, I d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  const auto eighths = [](__m512i x) {
    return _mm512_srli_epi16(_mm512_add_epi16(_mm512_abs_epi16(x), _mm512_set1_epi16(7)), 3);
  };
  const __m512i index = _mm512_packs_epi16(eighths(ab), eighths(cd)), one = _mm512_set1_epi8(1);
  const auto above = [&](int last) {
    return _mm512_cmpgt_epi8_mask(index, _mm512_set1_epi8(static_cast<char>(last)));
  };
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels4)));
  __m512i level = _mm512_shuffle_epi8(table, _mm512_min_epi8(index, _mm512_set1_epi8(15)));
  level = _mm512_mask_add_epi8(level, above(15), level, one);
  level = _mm512_mask_add_epi8(level, above(21), level, one);
  const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(ab, cd));
  level = _mm512_mask_sub_epi8(level, negative, _mm512_setzero_si512(), level);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order_of_packs(), level));
  return above(kLastOf4) == 0;
}
// The counters that philox is given in its lanes, such that its words are stored in order.
CAME8BIT_INLINE W consecutive(uint64_t first) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)), order);
}
// Four 32-bit words for each of eight counters.
CAME8BIT_INLINE void store_words(uint16_t* p, W w0, W w1, W w2, W w3) {
  const __m512i a = _mm512_mask_shuffle_epi32(w0.v, 0xaaaa, w1.v, _MM_PERM_CCAA);
  const __m512i b = _mm512_mask_shuffle_epi32(w2.v, 0xaaaa, w3.v, _MM_PERM_CCAA);
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(p + 32, _mm512_unpackhi_epi64(a, b));
}

// 16 -> 8 -> 4 -> 2 -> 1, adding the upper half to the lower.
CAME8BIT_INLINE float sum_lanes(F a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  y = _mm_add_ss(y, _mm_shuffle_ps(y, y, 1));
  return _mm_cvtss_f32(y);
}
CAME8BIT_INLINE float largest_lane(F a) {
  return _mm512_reduce_max_ps(a.v);
}

// Rows of eight, two in a vector. `of_two_rows`: p[0] in the lower half of the lanes, p[1] in the
// upper; `twice`: p[0 ... 7] in both.
CAME8BIT_INLINE F of_two_rows(const float* p) {
  return _mm512_mask_broadcastss_ps(_mm512_set1_ps(p[0]), 0xff00, _mm_load_ss(p + 1));
}
CAME8BIT_INLINE F twice(const float* p) {
  return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
}
CAME8BIT_INLINE F lower_halves(F x, F y) {
  return _mm512_shuffle_f32x4(x.v, y.v, 0x44);
}
CAME8BIT_INLINE F upper_halves(F x, F y) {
  return _mm512_shuffle_f32x4(x.v, y.v, 0xee);
}
// op over the lanes of each half of x and of y, in the order of sum_lanes.
template <class Op>
CAME8BIT_INLINE void over_eights(F x, F y, Op op, float* out) {
  const F four =
      op(F(_mm512_shuffle_f32x4(x.v, y.v, 0x88)), F(_mm512_shuffle_f32x4(x.v, y.v, 0xdd)));
  const F two = op(four, F(_mm512_permute_ps(four.v, 0x4e)));
  const F one = op(two, F(_mm512_permute_ps(two.v, 0xb1)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(order, one.v)));
}

}  // namespace avx512
}  // namespace came8bit
