// The 8-bit code for eight neighbouring values in a thread.
#pragma once

#include "vector_access.cuh"

namespace came8bit {

__device__ __forceinline__ bool has_zero_byte(uint32_t x) {
  return ((x - 0x01010101u) & ~x & 0x80808080u) != 0;
}

// Values of eight codes that share `absmax`. A byte that is put into the mantissa of 2^23 is a
// number without a conversion, which would be slow. `byte_pattern` is kBytePattern from memory: one
// of the two constants of a permutation has to be in a register, and the compiler would put it
// there anew for each byte.
__device__ __forceinline__ void decode_vector(const uint2& codes, float absmax,
                                              uint32_t byte_pattern, float* m) {
  const uint32_t shifted[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u};  // code + 128
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float biased = bits_float(__byte_perm(shifted[i / 4], byte_pattern, 0x7540u | (i % 4)));
    m[i] = decode(biased - (0x1p23f + 128.0f), absmax);
  }
  if (__builtin_expect(has_zero_byte(shifted[0]) || has_zero_byte(shifted[1]), 0)) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (((shifted[i / 4] >> (8 * (i % 4))) & 0xffu) == 0) m[i] = bits_float(0x7fc00000u);
    }
  }
}

__device__ __forceinline__ float decode_one(int8_t code, float absmax) {
  return code == kNanCode ? bits_float(0x7fc00000u) : decode(static_cast<float>(code), absmax);
}

// The largest magnitude below infinity.
__device__ __forceinline__ float largest_finite(const float* m) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (is_finite(m[i])) largest = larger_magnitude(largest, m[i]);
  }
  return largest;
}

// What `op` makes of x in the `lanes` neighbouring threads of a coarse block.
template <class T, class Op>
__device__ __forceinline__ T over_lanes(T x, int lanes, const Op& op) {
  if (lanes == kCoarseLanes) {
#pragma unroll
    for (int half = kCoarseLanes / 2; half > 0; half /= 2) {
      x = op(x, __shfl_xor_sync(0xffffffffu, x, half));
    }
    return x;
  }
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) {
    x = op(x, __shfl_xor_sync(0xffffffffu, x, half));
  }
  return x;
}

// The largest over neighbouring `lanes` threads; NaN if there is one.
template <int bits>
__device__ __forceinline__ float largest_of_lanes(float x, int lanes) {
  if constexpr (bits < 8) {
    return over_lanes(x, lanes, [](float a, float b) { return larger_magnitude(a, b); });
  }
  if (lanes == kWarp) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return bits_float(__reduce_max_sync(0xffffffffu, float_bits(x)));  // patterns sort like values
#else
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) {
      x = larger_magnitude(x, __shfl_xor_sync(0xffffffffu, x, half));
    }
    return x;
#endif
  }
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) {
    x = larger_magnitude(x, __shfl_xor_sync(0xffffffffu, x, half));
  }
  return x;
}

// A code as the low byte of a word; `value` is finite, `scale` is level_scale(absmax).
__device__ __forceinline__ uint32_t encode_one(float value, float scale, float step) {
  const float square = level_square(value, scale);
  const float level = code_level(square, rough_root(square), step);
  // Added to 1.5 * 2^23 a small number stands in the low bits, negative ones in two's complement.
  const float signed_level = bits_float(float_bits(level) | (float_bits(value) & 0x80000000u));
  return float_bits(signed_level + 0x1.8p23f);
}

// Levels of eight values, in the low bits of `words`, whose block, spread over `lanes` neighbouring
// threads, they are part of. Where `decaying[i]` is zero value i is rounded toward zero. All
// threads of the warp take part, also those whose values are not `there` but zeros. Returns the
// absmax.
template <int bits>
__device__ __forceinline__ float encode_levels(const float* m, const float* decaying, bool there,
                                               int lanes, uint32_t* words) {
  constexpr float kSquare = bits == 8 ? kLargestSquare : kLargestSquare4;
  constexpr int kNan = bits == 8 ? kNanCode : kNanCode4;
  float absmax = largest_of_lanes<bits>(largest_magnitude(m), lanes);
  // Nearly always: no value decays, the scale is an ordinary one, and of no value is the root so
  // close to the middle of two levels that it would have to be a better one. Then the level is the
  // root rounded to nearest. Added to 1.5 * 2^23 a number stands in the low bits, negative ones in
  // two's complement.
  const uint32_t pattern = float_bits(absmax), tiny = float_bits(kTinyAbsmax);
  bool sure = (pattern == 0 || pattern - tiny < 0x7f800000u - tiny) &&
              !(there && smallest_magnitude(decaying) == 0.0f);
  const float usual_scale = level_scale_of_usual(absmax, kSquare);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float root = rough_root(level_square(m[i], usual_scale));
    const float level = bits_float(float_bits(root) | (float_bits(m[i]) & 0x80000000u));
    const float code = level + 0x1.8p23f;
    sure = sure & (abs(level - (code - 0x1.8p23f)) < 0.5f - kRoughRootError);
    words[i] = float_bits(code);
  }
  if (!__all_sync(0xffffffffu, sure)) {
    absmax = largest_of_lanes<bits>(largest_finite(m), lanes);
    const float factor = absmax < kTinyAbsmax ? kTinyFactor : 1.0f,
                scale = level_scale(absmax, kSquare);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float step = decaying[i] == 0.0f ? kDecayStep : kNearestStep;
      words[i] =
          is_finite(m[i]) ? encode_one(m[i] * factor, scale, step) : static_cast<uint32_t>(kNan);
    }
    if (absmax < kSmallestAbsmax) absmax = 0.0f;
  }
  return absmax;
}

__device__ __forceinline__ float encode_vector(const float* m, const float* decaying, bool there,
                                               int lanes, uint2* codes) {
  uint32_t words[kVector];
  const float absmax = encode_levels<8>(m, decaying, there, lanes, words);
  const auto four = [&](int i) {
    return __byte_perm(__byte_perm(words[i], words[i + 1], 0x0040),
                       __byte_perm(words[i + 2], words[i + 3], 0x0040), 0x5410);
  };
  *codes = make_uint2(four(0), four(4));
  return absmax;
}

// The elements of one block of a code, wherever rows end: the work of a warp, or of half of one.
template <int block_size>
struct BlockPlace {
  static constexpr int kThreadsOfBlock = block_size / kVector;
  int64_t block;  // -1: there is none for this warp
  int64_t first;  // element of this thread
  int count;      // how many of its kVector elements there are
  int64_t slice;  // of the block
  int64_t at;     // where `first` is in it
  int size;       // elements of the block

  __device__ __forceinline__ BlockPlace(int64_t slices, int64_t slice_len, int64_t task) {
    const int64_t per_slice = (slice_len + block_size - 1) / block_size;
    block = task * (kThreads / kThreadsOfBlock) + threadIdx.x / kThreadsOfBlock;
    first = slice = at = 0;
    count = size = 0;
    if (block >= slices * per_slice) {
      block = -1;
      return;
    }
    slice = block / per_slice;
    const int64_t begin = (block - slice * per_slice) * block_size;
    at = begin + int64_t{threadIdx.x % kThreadsOfBlock} * kVector;
    size = static_cast<int>(slice_len - begin < block_size ? slice_len - begin : block_size);
    const int64_t left = slice_len - at;
    first = slice * slice_len + at;
    count = static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector);
  }
};

// Stores the codes of the elements that there are.
__device__ __forceinline__ void store_codes(const uint2& codes, const BlockPlace<kBlockSize>& place,
                                            int8_t* out) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t word = i < 4 ? codes.x : codes.y;
    if (i < place.count) out[place.first + i] = static_cast<int8_t>(word >> (8 * (i % 4)));
  }
}

}  // namespace came8bit
