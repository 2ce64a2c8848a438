// Sixteen lanes in two 256-bit registers. Needs AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "../../quant.h"

namespace came8bit {
namespace avx2 {

constexpr bool kManyRegisters = false;

struct F {
  __m256 a, b;
  F() = default;
  CAME8BIT_INLINE F(__m256 x, __m256 y) : a(x), b(y) {}
  CAME8BIT_INLINE explicit F(float x) : a(_mm256_set1_ps(x)), b(_mm256_set1_ps(x)) {}
};

struct I {
  __m256i a, b;
  I() = default;
  CAME8BIT_INLINE I(__m256i x, __m256i y) : a(x), b(y) {}
  CAME8BIT_INLINE explicit I(int32_t x) : a(_mm256_set1_epi32(x)), b(_mm256_set1_epi32(x)) {}
};

// Four lanes of 64 bits, for random numbers.
struct W {
  __m256i v;
  W() = default;
  CAME8BIT_INLINE W(__m256i x) : v(x) {}
  CAME8BIT_INLINE explicit W(uint64_t x) : v(_mm256_set1_epi64x(static_cast<long long>(x))) {}
};
constexpr int kCounters = 4;

struct M {
  __m256 a, b;
};

CAME8BIT_INLINE F operator+(F x, F y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
CAME8BIT_INLINE F operator-(F x, F y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
CAME8BIT_INLINE F operator*(F x, F y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
CAME8BIT_INLINE F operator/(F x, F y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
CAME8BIT_INLINE F sqrt(F x) {
  return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
}
CAME8BIT_INLINE F abs(F x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
CAME8BIT_INLINE M operator<(F x, F y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
CAME8BIT_INLINE M operator<=(F x, F y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ)};
}
CAME8BIT_INLINE M operator>(F x, F y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
CAME8BIT_INLINE M operator==(F x, F y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
CAME8BIT_INLINE M operator<(I x, I y) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))};
}
CAME8BIT_INLINE M operator==(I x, I y) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(x.a, y.a)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(x.b, y.b))};
}
CAME8BIT_INLINE M operator&(M x, M y) {
  return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)};
}
CAME8BIT_INLINE M operator|(M x, M y) {
  return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)};
}
CAME8BIT_INLINE F select(M m, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
// Bit i is lane i.
CAME8BIT_INLINE unsigned mask(M m) {
  return static_cast<unsigned>(_mm256_movemask_ps(m.a)) |
         (static_cast<unsigned>(_mm256_movemask_ps(m.b)) << 8);
}
CAME8BIT_INLINE int bit_count(unsigned x) {
  return _mm_popcnt_u32(x);
}
// The larger; `y` where `x` is NaN.
CAME8BIT_INLINE F larger(F x, F y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
// The larger, the smaller of |x| and y >= 0; y where x is NaN.
CAME8BIT_INLINE F larger_magnitude(F x, F y) {
  return larger(abs(x), y);
}
CAME8BIT_INLINE F smaller_magnitude(F x, F y) {
  return {_mm256_min_ps(abs(x).a, y.a), _mm256_min_ps(abs(x).b, y.b)};
}

CAME8BIT_INLINE I operator+(I x, I y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
CAME8BIT_INLINE I operator&(I x, I y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
CAME8BIT_INLINE I operator|(I x, I y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
CAME8BIT_INLINE I operator^(I x, I y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
template <int n>
CAME8BIT_INLINE I shift_right(I x, Shift<n>) {
  return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
}
CAME8BIT_INLINE I bits(F x) {
  return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
CAME8BIT_INLINE F from_bits(I x) {
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
CAME8BIT_INLINE I select(M m, I yes, I no) {
  return bits(select(m, from_bits(yes), from_bits(no)));
}
CAME8BIT_INLINE F to_float(I x) {
  return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
// NaN and what does not fit give INT32_MIN.
CAME8BIT_INLINE I truncate(F x) {
  return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)};
}
// x + 1 where m is true.
CAME8BIT_INLINE I increment_if(M m, I x) {
  return {_mm256_sub_epi32(x.a, _mm256_castps_si256(m.a)),
          _mm256_sub_epi32(x.b, _mm256_castps_si256(m.b))};
}
// -x where `sign` is negative; 0 may stay or not where `sign` is 0. INT32_MIN stays.
CAME8BIT_INLINE I with_sign(I x, F sign) {
  return {_mm256_sign_epi32(x.a, _mm256_castps_si256(sign.a)),
          _mm256_sign_epi32(x.b, _mm256_castps_si256(sign.b))};
}
CAME8BIT_INLINE bool any(M m) {
  return _mm256_movemask_ps(_mm256_or_ps(m.a, m.b)) != 0;
}
CAME8BIT_INLINE bool any_nan(F x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) != 0;
}
// Square root of 0 ... 2^14 with an error below 0.05; NaN for NaN.
CAME8BIT_INLINE F rough_root(F x) {
  const __m256 tiny = _mm256_set1_ps(1e-20f);
  return {_mm256_mul_ps(x.a, _mm256_rsqrt_ps(_mm256_max_ps(tiny, x.a))),
          _mm256_mul_ps(x.b, _mm256_rsqrt_ps(_mm256_max_ps(tiny, x.b)))};
}
CAME8BIT_INLINE W multiply(W x, uint32_t factor) {
  return _mm256_mul_epu32(x.v, _mm256_set1_epi64x(factor));
}
CAME8BIT_INLINE W high_half(W x) {
  return _mm256_srli_epi64(x.v, 32);
}
CAME8BIT_INLINE W exclusive_or(W x, W y, W z) {
  return _mm256_xor_si256(_mm256_xor_si256(x.v, y.v), z.v);
}

CAME8BIT_INLINE __m128i load_128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
CAME8BIT_INLINE F load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
CAME8BIT_INLINE I load(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(load_128(p)), _mm256_cvtepu16_epi32(load_128(p + 8))};
}
// Words to the upper halves of lanes: a load that doubles, and one shuffle within 128 bits.
CAME8BIT_INLINE __m256 load_upper(const Bf16* p) {
  const __m256i words = _mm256_broadcastsi128_si256(load_128(p));
  const __m256i to_upper =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                       10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(words, to_upper));
}
CAME8BIT_INLINE F load(const Bf16* p) {
  return {load_upper(p), load_upper(p + 8)};
}
CAME8BIT_INLINE F load(const Half* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}
// Twice from memory: of a register, sign extension takes two operations more.
CAME8BIT_INLINE __m256i load_codes(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
CAME8BIT_INLINE I load(const int8_t* p) {
  return {load_codes(p), load_codes(p + 8)};
}
CAME8BIT_INLINE bool one_of_64_is(const int8_t* p, int8_t code) {
  const __m256i* codes = reinterpret_cast<const __m256i*>(p);
  const __m256i wanted = _mm256_set1_epi8(code);
  const __m256i found = _mm256_or_si256(_mm256_cmpeq_epi8(_mm256_loadu_si256(codes), wanted),
                                        _mm256_cmpeq_epi8(_mm256_loadu_si256(codes + 1), wanted));
  return _mm256_movemask_epi8(found) != 0;
}
CAME8BIT_INLINE I load(const int32_t* p) {
  return bits(load(reinterpret_cast<const float*>(p)));
}

// Eight values in the first lanes, the others zero.
CAME8BIT_INLINE F load_eight(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_setzero_ps()};
}
CAME8BIT_INLINE I load_eight(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(load_128(p)), _mm256_setzero_si256()};
}
CAME8BIT_INLINE F load_eight(const Bf16* p) {
  return {load_upper(p), _mm256_setzero_ps()};
}
CAME8BIT_INLINE F load_eight(const Half* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_setzero_ps()};
}
CAME8BIT_INLINE I load_eight(const int8_t* p) {
  return {load_codes(p), _mm256_setzero_si256()};
}

CAME8BIT_INLINE void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
CAME8BIT_INLINE void store(int32_t* p, I x) {
  store(reinterpret_cast<float*>(p), from_bits(x));
}
CAME8BIT_INLINE void store(Half* p, F x) {
  __m128i* out = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
// The upper halves of the lanes.
CAME8BIT_INLINE void store(Bf16* p, I x) {
  const __m256i packed =
      _mm256_packus_epi32(_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
// Saturates.
CAME8BIT_INLINE void store(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
// Sixteen packed codes of `n` bits in the lowest bits of the lanes; above them is rubbish.
template <int n>
CAME8BIT_INLINE I load_packed(const uint8_t* p) {
  const auto word = [](const uint8_t* four) {
    int32_t out;
    memcpy(&out, four, sizeof out);
    return _mm256_set1_epi32(out);
  };
  const __m256i lane = _mm256_setr_epi32(0, n, 2 * n, 3 * n, 4 * n, 5 * n, 6 * n, 7 * n);
  const __m256i first = word(p);
  if (n == 4) return {_mm256_srlv_epi32(first, lane), _mm256_srlv_epi32(word(p + 4), lane)};
  return {_mm256_srlv_epi32(first, lane),
          _mm256_srlv_epi32(first, _mm256_add_epi32(lane, _mm256_set1_epi32(8 * n)))};
}
// Of sixteen values those that the lowest four bits of the lanes say.
CAME8BIT_INLINE __m256 look_up(F value, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(value.a, index);
  const __m256 high = _mm256_permutevar8x32_ps(value.b, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
CAME8BIT_INLINE F look_up(F value, I index) {
  return {look_up(value, index.a), look_up(value, index.b)};
}
// Packs work within 128 bits, and leave groups of four in the order 0 2 4 6 1 3 5 7.
CAME8BIT_INLINE __m256i order_of_packs() {
  return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
}
// Packs 64 codes of 4 or 2 bits, the lowest bits of bytes.
template <int n>
CAME8BIT_INLINE void pack_64(const int8_t* wide, uint8_t* codes) {
  const __m256i* bytes = reinterpret_cast<const __m256i*>(wide);
  const __m256i mask = _mm256_set1_epi8((1 << n) - 1), pair = _mm256_set1_epi16(1 | 256 << n);
  const __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_loadu_si256(bytes), mask), pair);
  const __m256i b =
      _mm256_maddubs_epi16(_mm256_and_si256(_mm256_loadu_si256(bytes + 1), mask), pair);
  if (n == 4) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), packed);
  }
  const __m256i four = _mm256_set1_epi32(1 | 16 << 16);
  const __m256i words = _mm256_packs_epi32(_mm256_madd_epi16(a, four), _mm256_madd_epi16(b, four));
  const __m256i packed =
      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order_of_packs());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_castsi256_si128(packed));
}
// 32 codes.
CAME8BIT_INLINE __m256i packed_codes(I a, I b) {
  const __m256i words_a = _mm256_packs_epi32(a.a, a.b), words_b = _mm256_packs_epi32(b.a, b.b);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words_a, words_b), order_of_packs());
}
// 64 codes; saturates.
CAME8BIT_INLINE void store_codes(int8_t* p, I a, I b, I c, I d) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed_codes(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), packed_codes(c, d));
}
// Levels of 4 bits of 32 elements, from what kLevels4 is for: 4*square with the sign of the
// element. Returns whether none is NaN, which is INT32_MIN.
CAME8BIT_INLINE bool store_levels4(int8_t* p, I a, I b) {
  const __m256i first = _mm256_packs_epi32(a.a, a.b), second = _mm256_packs_epi32(b.a, b.b);
  const auto eighths = [](__m256i x) {
    return _mm256_srli_epi16(_mm256_add_epi16(_mm256_abs_epi16(x), _mm256_set1_epi16(7)), 3);
  };
  const __m256i index = _mm256_packs_epi16(eighths(first), eighths(second));
  const auto above = [&](int last) {
    return _mm256_cmpgt_epi8(index, _mm256_set1_epi8(static_cast<char>(last)));
  };
  const __m256i table = _mm256_broadcastsi128_si256(load_128(kLevels4));
  __m256i level = _mm256_shuffle_epi8(table, _mm256_min_epi8(index, _mm256_set1_epi8(15)));
  level = _mm256_sub_epi8(_mm256_sub_epi8(level, above(15)), above(21));
  level = _mm256_sign_epi8(level, _mm256_packs_epi16(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permutevar8x32_epi32(level, order_of_packs()));
  return _mm256_movemask_epi8(above(kLastOf4)) == 0;
}
CAME8BIT_INLINE bool store_levels4(int8_t* p, I a, I b, I c, I d) {
  const bool none = store_levels4(p, a, b);
  return store_levels4(p + 32, c, d) && none;
}
// The counters that philox is given in its lanes, such that its words are stored in order.
CAME8BIT_INLINE W consecutive(uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first)),
                          _mm256_setr_epi64x(0, 2, 1, 3));
}
// Four 32-bit words for each of four counters.
CAME8BIT_INLINE void store_words(uint16_t* p, W w0, W w1, W w2, W w3) {
  const __m256i a = _mm256_blend_epi32(w0.v, _mm256_slli_epi64(w1.v, 32), 0xaa);
  const __m256i b = _mm256_blend_epi32(w2.v, _mm256_slli_epi64(w3.v, 32), 0xaa);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi64(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm256_unpackhi_epi64(a, b));
}

// 16 -> 8 -> 4 -> 2 -> 1, adding the upper half to the lower.
CAME8BIT_INLINE float sum_lanes(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  y = _mm_add_ss(y, _mm_shuffle_ps(y, y, 1));
  return _mm_cvtss_f32(y);
}
CAME8BIT_INLINE float largest_lane(F x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  y = _mm_max_ss(y, _mm_shuffle_ps(y, y, 1));
  return _mm_cvtss_f32(y);
}

// Rows of eight, two in a vector. `of_two_rows`: p[0] in the lower half of the lanes, p[1] in the
// upper; `twice`: p[0 ... 7] in both.
CAME8BIT_INLINE F of_two_rows(const float* p) {
  return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)};
}
CAME8BIT_INLINE F twice(const float* p) {
  const __m256 x = _mm256_loadu_ps(p);
  return {x, x};
}
CAME8BIT_INLINE F lower_halves(F x, F y) {
  return {x.a, y.a};
}
CAME8BIT_INLINE F upper_halves(F x, F y) {
  return {x.b, y.b};
}
// op over the lanes of each half of x and of y, in the order of sum_lanes.
template <class Op>
CAME8BIT_INLINE void over_eights(F x, F y, Op op, float* out) {
  // Lower and upper quarters of rows 0 and 1 | 2 and 3.
  const F four =
      op(F(_mm256_permute2f128_ps(x.a, x.b, 0x20), _mm256_permute2f128_ps(y.a, y.b, 0x20)),
         F(_mm256_permute2f128_ps(x.a, x.b, 0x31), _mm256_permute2f128_ps(y.a, y.b, 0x31)));
  const F zero(0.0f);  // the second register is not used any more
  const F two = op(F(_mm256_shuffle_ps(four.a, four.b, 0x44), zero.b),
                   F(_mm256_shuffle_ps(four.a, four.b, 0xee), zero.b));
  const F one = op(two, F(_mm256_permute_ps(two.a, 0xb1), zero.b));
  const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6);
  _mm_storeu_ps(out, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(one.a, order)));
}

}  // namespace avx2
}  // namespace came8bit
