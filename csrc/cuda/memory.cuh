// Reading and writing eight neighbouring elements: as one or two 16-byte accesses where the layout
// allows ("fast": contiguous, aligned, rows of a multiple of eight), else one by one.
#pragma once

#include "../rounding.h"
#include "parameter.h"

namespace came8bit {

// Stands for a type that is known only when running: Strided::dtype.
struct Any {};

// Eight elements as they lie in memory.
template <class T>
struct Pack {  // Bf16, Half
  uint4 words;
};
template <>
struct Pack<float> {
  float4 low, high;
};
template <>
struct Pack<Any> {
  uint4 low, high;
};

CAME8BIT_INLINE uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const Strided& t, int64_t e);

template <>
__device__ __forceinline__ Pack<float> load_pack<float>(const Strided& t, int64_t e) {
  const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(t.data) + e);
  return {p[0], p[1]};
}
template <>
__device__ __forceinline__ Pack<Bf16> load_pack<Bf16>(const Strided& t, int64_t e) {
  return {*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(t.data) + e)};
}
template <>
__device__ __forceinline__ Pack<Half> load_pack<Half>(const Strided& t, int64_t e) {
  return {*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(t.data) + e)};
}
template <>
__device__ __forceinline__ Pack<Any> load_pack<Any>(const Strided& t, int64_t e) {
  Pack<Any> pack = {};
  if (t.dtype == kFloat32) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const float*>(t.data) + e);
    pack.low = p[0];
    pack.high = p[1];
  } else {
    pack.low = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(t.data) + e);
  }
  return pack;
}

__device__ __forceinline__ void unpack_floats(const float4& low, const float4& high, float* x) {
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void unpack_bf16(const uint4& words, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = word_of(words, i);
    x[2 * i] = bits_float(word << 16);
    x[2 * i + 1] = bits_float(word & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack_half(const uint4& words, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = word_of(words, i);
    x[2 * i] = half_to_float({static_cast<uint16_t>(word & 0xffffu)});
    x[2 * i + 1] = half_to_float({static_cast<uint16_t>(word >> 16)});
  }
}

__device__ __forceinline__ void unpack(const Strided&, const Pack<float>& pack, float* x) {
  unpack_floats(pack.low, pack.high, x);
}
__device__ __forceinline__ void unpack(const Strided&, const Pack<Bf16>& pack, float* x) {
  unpack_bf16(pack.words, x);
}
__device__ __forceinline__ void unpack(const Strided&, const Pack<Half>& pack, float* x) {
  unpack_half(pack.words, x);
}
__device__ __forceinline__ void unpack(const Strided& t, const Pack<Any>& pack, float* x) {
  if (t.dtype == kFloat32) {
    const uint4 &low = pack.low, &high = pack.high;
    unpack_floats({bits_float(low.x), bits_float(low.y), bits_float(low.z), bits_float(low.w)},
                  {bits_float(high.x), bits_float(high.y), bits_float(high.z), bits_float(high.w)},
                  x);
  } else if (t.dtype == kBfloat16) {
    unpack_bf16(pack.low, x);
  } else {
    unpack_half(pack.low, x);
  }
}

// Two fp32 values rounded to bf16, each with 16 random bits or (not `stochastic`) to nearest.
__device__ __forceinline__ uint32_t two_bf16(float a, float b, uint32_t random, bool stochastic) {
  const int32_t low = round_bf16(a, static_cast<int32_t>(random & 0xffffu), stochastic);
  const int32_t high = round_bf16(b, static_cast<int32_t>(random >> 16), stochastic);
  return __byte_perm(static_cast<uint32_t>(low), static_cast<uint32_t>(high), 0x7632);
}
__device__ __forceinline__ uint32_t two_half(float a, float b, uint32_t random, bool stochastic) {
  if (stochastic) {
    a = round_fp16(a, static_cast<int32_t>(random & 0xffffu));
    b = round_fp16(b, static_cast<int32_t>(random >> 16));
  }
  return uint32_t{float_to_half(a).bits} | (uint32_t{float_to_half(b).bits} << 16);
}

template <class T>
struct Tag {};

// Stores eight values; `random` holds their random bits.
__device__ __forceinline__ void store_pack(Tag<float>, const Strided& t, int64_t e, const float* x,
                                           const uint4&, bool) {
  float4* p = reinterpret_cast<float4*>(static_cast<float*>(t.data) + e);
  p[0] = make_float4(x[0], x[1], x[2], x[3]);
  p[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store_pack(Tag<Bf16>, const Strided& t, int64_t e, const float* x,
                                           const uint4& random, bool stochastic) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = two_bf16(x[2 * i], x[2 * i + 1], word_of(random, i), stochastic);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.data) + e) =
      make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void store_pack(Tag<Half>, const Strided& t, int64_t e, const float* x,
                                           const uint4& random, bool stochastic) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = two_half(x[2 * i], x[2 * i + 1], word_of(random, i), stochastic);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.data) + e) =
      make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void store_pack(Tag<Any>, const Strided& t, int64_t e, const float* x,
                                           const uint4& random, bool stochastic) {
  if (t.dtype == kFloat32) {
    store_pack(Tag<float>(), t, e, x, random, stochastic);
  } else if (t.dtype == kBfloat16) {
    store_pack(Tag<Bf16>(), t, e, x, random, stochastic);
  } else {
    store_pack(Tag<Half>(), t, e, x, random, stochastic);
  }
}

// --- one by one
// ----------------------------------------------------------------------------------- Calls, not
// copies in every kernel: what they are used for is rare and bound by other things.

// Where element `e` of the row-major order is, counted in elements.
__device__ __forceinline__ int64_t offset_of(const Strided& t, int64_t e) {
  if (t.strides == nullptr) return e;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = t.strides->dims - 1; d >= 0; --d) {
    const int64_t size = t.strides->sizes[d];
    const int64_t rest = e / size;
    offset += (e - rest * size) * t.strides->strides[d];
    e = rest;
  }
  return offset;
}

__device__ __noinline__ float load_one(const Strided& t, int64_t e) {
  const int64_t i = offset_of(t, e);
  if (t.dtype == kFloat32) return static_cast<const float*>(t.data)[i];
  const uint16_t pattern = static_cast<const uint16_t*>(t.data)[i];
  return t.dtype == kBfloat16 ? bits_float(uint32_t{pattern} << 16) : half_to_float({pattern});
}

__device__ __noinline__ void store_one(const Strided& t, int64_t e, float x, uint32_t random,
                                       bool stochastic) {
  const int64_t i = offset_of(t, e);
  if (t.dtype == kFloat32) {
    static_cast<float*>(t.data)[i] = x;
  } else {
    const uint32_t two = t.dtype == kBfloat16 ? two_bf16(x, 0.0f, random, stochastic)
                                              : two_half(x, 0.0f, random, stochastic);
    static_cast<uint16_t*>(t.data)[i] = static_cast<uint16_t>(two);
  }
}

// `count` elements from `e` on, then zeros.
__device__ __forceinline__ void load_some(const Strided& t, int64_t e, int count, float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = i < count ? load_one(t, e + i) : 0.0f;
}

// --- random bits
// ----------------------------------------------------------------------------------

// The 16 bits each of elements 8*counter ... 8*counter + 7 of the full parameter, low half first.
__device__ __forceinline__ uint4 random_words(uint64_t counter, uint32_t index, uint32_t step,
                                              uint64_t seed) {
  uint64_t c0 = counter, c1 = counter >> 32, c2 = index, c3 = step;
  philox(c0, c1, c2, c3, seed);
  return make_uint4(static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
                    static_cast<uint32_t>(c3));
}

// Those of elements e ... e + 7, wherever e is.
__device__ __noinline__ uint4 random_words_at(uint64_t e, uint32_t index, uint32_t step,
                                              uint64_t seed) {
  const uint4 first = random_words(e / 8, index, step, seed);
  const int skip = static_cast<int>(e % 8);
  if (skip == 0) return first;
  const uint4 second = random_words(e / 8 + 1, index, step, seed);
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 2 * i + half + skip;
      const uint32_t word = at < 8 ? word_of(first, at / 2) : word_of(second, at / 2 - 4);
      halves[half] = at % 2 == 0 ? word & 0xffffu : word >> 16;
    }
    out[i] = halves[0] | (halves[1] << 16);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace came8bit
