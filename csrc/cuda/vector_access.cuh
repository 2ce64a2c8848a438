// Reading and writing eight neighbouring elements: as one or two 16-byte accesses where the layout
// allows ("fast": contiguous, aligned, rows of a multiple of eight), else one by one.
#pragma once

#include "../rounding.h"
#include "parameter.h"

namespace came8bit {

// Stands for a type that is known only when running: Strided::dtype.
struct Any {};

// Eight elements as they lie in memory: 16 or 32 bytes.
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

// Where eight elements are, in bytes, and how far apart neighbours stand.
template <class T>
__device__ __forceinline__ int item_bytes(const Strided& t) {
  return sizeof(T) == sizeof(float) || (sizeof(T) == 1 && t.dtype == kFloat32) ? 4 : 2;
}
template <class T>
__device__ __forceinline__ char* bytes_at(const Strided& t, int64_t e) {
  return t.data.as<char>() + e * item_bytes<T>(t);
}

// Loads that stay in the L2 cache: no line is read twice by one multiprocessor.
__device__ __forceinline__ Pack<float> load_pack(Pack<float>, const Strided&, const char* p) {
  const float4* words = reinterpret_cast<const float4*>(p);
  return {__ldcg(words), __ldcg(words + 1)};
}
__device__ __forceinline__ Pack<Bf16> load_pack(Pack<Bf16>, const Strided&, const char* p) {
  return {__ldcg(reinterpret_cast<const uint4*>(p))};
}
__device__ __forceinline__ Pack<Half> load_pack(Pack<Half>, const Strided&, const char* p) {
  return {__ldcg(reinterpret_cast<const uint4*>(p))};
}
__device__ __forceinline__ Pack<Any> load_pack(Pack<Any>, const Strided& t, const char* p) {
  const uint4* words = reinterpret_cast<const uint4*>(p);
  Pack<Any> pack = {};
  pack.low = __ldcg(words);
  if (t.dtype == kFloat32) pack.high = __ldcg(words + 1);
  return pack;
}
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const Strided& t, const char* p) {
  return load_pack(Pack<T>{}, t, p);
}
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const Strided& t, int64_t e) {
  return load_pack(Pack<T>{}, t, bytes_at<T>(t, e));
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

// The larger magnitude; NaN if there is one.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(abs(a)), "f"(abs(b)));
  return larger;
#else
  const uint32_t x = float_bits(a) & 0x7fffffffu, y = float_bits(b) & 0x7fffffffu;
  return bits_float(x < y ? y : x);
#endif
}
__device__ __forceinline__ float largest_magnitude(const float* x) {
  return larger_magnitude(
      larger_magnitude(larger_magnitude(x[0], x[1]), larger_magnitude(x[2], x[3])),
      larger_magnitude(larger_magnitude(x[4], x[5]), larger_magnitude(x[6], x[7])));
}

// The smallest magnitude that is a number, or else NaN.
__device__ __forceinline__ float smallest_magnitude(const float* x) {
  float smallest = abs(x[0]);
#pragma unroll
  for (int i = 1; i < kVector; ++i) smallest = ::fminf(smallest, abs(x[i]));
  return smallest;
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

// Stores eight values that will not be read again soon; `random` holds their random bits.
__device__ __forceinline__ void store_pack(Tag<float>, const Strided&, char* p, const float* x,
                                           const uint4&, bool) {
  __stcs(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
  __stcs(reinterpret_cast<float4*>(p) + 1, make_float4(x[4], x[5], x[6], x[7]));
}
__device__ __forceinline__ void store_pack(Tag<Bf16>, const Strided&, char* p, const float* x,
                                           const uint4& random, bool stochastic) {
  uint32_t words[4];
  if (stochastic && largest_magnitude(x) < bits_float(0x7f7f0000u)) {
    // None is beyond the largest finite bf16: round_bf16 is an addition.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = word_of(random, i);
      words[i] = __byte_perm(float_bits(x[2 * i]) + (word & 0xffffu),
                             float_bits(x[2 * i + 1]) + (word >> 16), 0x7632);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = two_bf16(x[2 * i], x[2 * i + 1], word_of(random, i), stochastic);
    }
  }
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
}
__device__ __forceinline__ void store_pack(Tag<Half>, const Strided&, char* p, const float* x,
                                           const uint4& random, bool stochastic) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = two_half(x[2 * i], x[2 * i + 1], word_of(random, i), stochastic);
  }
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
}
__device__ __forceinline__ void store_pack(Tag<Any>, const Strided& t, char* p, const float* x,
                                           const uint4& random, bool stochastic) {
  if (t.dtype == kFloat32) {
    store_pack(Tag<float>(), t, p, x, random, stochastic);
  } else if (t.dtype == kBfloat16) {
    store_pack(Tag<Bf16>(), t, p, x, random, stochastic);
  } else {
    store_pack(Tag<Half>(), t, p, x, random, stochastic);
  }
}

// --- one by one ---------------------------------------------------------------------------------

// Where element `e` of the row-major order is, counted in elements. A call, not copies in every
// kernel: few elements need it.
static __device__ __noinline__ int64_t offset_of(const Strided& t, int64_t e) {
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

// Places of elements e, e + 1, ... of the row-major order: where strides allow, without divisions.
// `contiguous` tensors have no strides.
template <bool contiguous>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Strided& t, int64_t e) : t_(t), e_(e) {
    if (contiguous) return;
    if (t.strides.pointer == nullptr) {
      offset_ = e;
      stride_ = 1;
      left_ = INT64_MAX;
    } else {
      const int last = t.strides->dims - 1;
      offset_ = offset_of(t, e);
      stride_ = t.strides->strides[last];
      left_ = t.strides->sizes[last] - e % t.strides->sizes[last];
    }
  }
  // The place of the current element, in elements; goes on to the next.
  __device__ __forceinline__ int64_t next() {
    if (contiguous) return e_++;
    const int64_t here = offset_;
    ++e_;
    offset_ += stride_;
    if (--left_ == 0) {
      offset_ = offset_of(t_, e_);
      left_ = t_.strides->sizes[t_.strides->dims - 1];
    }
    return here;
  }

 private:
  const Strided& t_;
  int64_t e_, offset_, stride_;
  int64_t left_;  // elements that lie `stride_` apart, from here on
};

// `count` elements from `e` on, then zeros.
template <bool contiguous = false>
__device__ __forceinline__ void load_some(const Strided& t, int64_t e, int count, float* x) {
  Walk<contiguous> walk(t, e);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    x[i] = 0.0f;
    if (i >= count) continue;
    const int64_t at = walk.next();
    if (t.dtype == kFloat32) {
      x[i] = t.data.as<const float>()[at];
    } else {
      const uint16_t pattern = t.data.as<const uint16_t>()[at];
      x[i] = t.dtype == kBfloat16 ? bits_float(uint32_t{pattern} << 16) : half_to_float({pattern});
    }
  }
}

// Stores `count` values from `e` on; `random` holds their random bits.
template <bool contiguous = false>
__device__ __forceinline__ void store_some(const Strided& t, int64_t e, int count, const float* x,
                                           const uint4& random, bool stochastic) {
  Walk<contiguous> walk(t, e);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= count) continue;
    const int64_t at = walk.next();
    const uint32_t bits = word_of(random, i / 2) >> (16 * (i % 2)) & 0xffffu;
    if (t.dtype == kFloat32) {
      t.data.as<float>()[at] = x[i];
    } else {
      const uint32_t two = t.dtype == kBfloat16 ? two_bf16(x[i], 0.0f, bits, stochastic)
                                                : two_half(x[i], 0.0f, bits, stochastic);
      t.data.as<uint16_t>()[at] = static_cast<uint16_t>(two);
    }
  }
}

// --- random bits --------------------------------------------------------------------------------

// The 16 bits each of elements 8*counter ... 8*counter + 7 of the full parameter, low half first.
__device__ __forceinline__ uint4 random_words(uint64_t counter, uint32_t index, uint32_t step,
                                              uint64_t seed) {
  uint64_t c0 = counter, c1 = counter >> 32, c2 = index, c3 = step;
  philox(c0, c1, c2, c3, seed);
  return make_uint4(static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
                    static_cast<uint32_t>(c3));
}

// Those of elements e ... e + 7, wherever e is.
static __device__ __noinline__ uint4 random_words_at(uint64_t e, uint32_t index, uint32_t step,
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
