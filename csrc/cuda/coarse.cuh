// The codes of 4, 2 and 0 bits for eight neighbouring values in a thread.
#pragma once

#include "codec.cuh"

namespace came8bit {

// Types of stored momentum beside int8_t and float: eight codes, and the scales of their block.
struct Bits4 {
  uint32_t codes;
  uint16_t scale;
};
struct Bits2 {
  uint16_t codes;
  uint32_t scales;  // the lower level in the lower half
};
struct Bits0 {
  uint16_t codes;  // 0, and never in memory: whatever is read or written through it does nothing
};

template <class M>
constexpr int kBits = 8 * sizeof(M);  // of int8_t, float
template <>
constexpr int kBits<Bits4> = 4;
template <>
constexpr int kBits<Bits2> = 2;
template <>
constexpr int kBits<Bits0> = 0;
template <class M>
constexpr bool kCoarse = kBits<M> < 8;
template <class M>
constexpr int kBlock = kCoarse<M> ? kCoarseBlock : kBlockSize;

// The byte with the code of value `at` of a slice.
template <class M>
__device__ __forceinline__ uint8_t* packed_codes(const Parameter& p, int64_t slice, int64_t at) {
  return p.exp_avg.as<uint8_t>() + slice * bytes_of_slice(p.slice_len, kBits<M>) +
         at * kBits<M> / 8;
}

// The scales of block `block`; of int8_t and float, absmax or nothing.
template <class M>
__device__ __forceinline__ auto* scales_of(const Parameter& p, int64_t block) {
  float* absmax = p.absmax;
  if constexpr (kCoarse<M>) {
    return reinterpret_cast<uint16_t*>(absmax) + block * scales_of_block(kBits<M>);
  } else {
    return kBits<M> == 8 ? absmax + block : nullptr;
  }
}

// --- reading ----------------------------------------------------------------------------------

__device__ __forceinline__ void load_scales(const uint16_t* scales, Bits4* m) {
  m->scale = __ldcg(scales);
}
__device__ __forceinline__ void load_scales(const uint16_t* scales, Bits2* m) {
  m->scales = __ldcg(scales) | uint32_t{__ldcg(scales + 1)} << 16;
}

__device__ __forceinline__ void load_scales(const uint16_t*, Bits0*) {}

// Eight codes, and the scales of their block: each in one access.
__device__ __forceinline__ void load_vector(const char* codes, const uint16_t* scales, Bits4* m) {
  m->codes = __ldcg(reinterpret_cast<const uint32_t*>(codes));
  m->scale = __ldcg(scales);
}
__device__ __forceinline__ void load_vector(const char* codes, const uint16_t* scales, Bits2* m) {
  m->codes = __ldcg(reinterpret_cast<const uint16_t*>(codes));
  m->scales = __ldcg(reinterpret_cast<const uint32_t*>(scales));
}
__device__ __forceinline__ void load_vector(const char*, const uint16_t*, Bits0*) {}

// Scales of a row that has blocks of its own, and in it those before the block of a column.
template <class M>
__device__ __forceinline__ int64_t column_scales(int64_t column) {
  return column / kCoarseBlock * scales_of_block(kBits<M>);
}
template <class M>
__device__ __forceinline__ int64_t row_scales(const Parameter& p) {
  return column_scales<M>(p.k + kCoarseBlock - 1);
}

__device__ __forceinline__ float decode_one(uint32_t code, const Bits4& m, float factor) {
  if (code == (kNanCode4 & 15)) return bits_float(0x7fc00000u);
  const float biased = bits_float(kBytePattern | (code ^ 8u));  // code + 8
  return decode4(biased - (0x1p23f + 8.0f), scale_of(m.scale) * factor);
}
__device__ __forceinline__ float decode_one(uint32_t code, const Bits2& m, float factor) {
  const uint32_t level_bits = (code & 1u) != 0 ? m.scales & 0xffff0000u : m.scales << 16;
  const float level = bits_float(level_bits) * factor;
  return bits_float(float_bits(level) ^ (code & 2u) << 30);
}
__device__ __forceinline__ float decode_one(uint32_t, const Bits0&, float) {
  return 0.0f;
}
// Eight of them, with their scales times `factor`.
template <class M>
__device__ __forceinline__ void decode_vector(const M& stored, float factor, float* m) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t code = uint32_t{stored.codes} >> (kBits<M> * i) & ((1u << kBits<M>)-1);
    m[i] = decode_one(code, stored, factor);
  }
}

// The momentum of a thread's part of a block, times `factor`; zeros behind its end.
template <class M>
__device__ __forceinline__ void load_block(const Parameter& p,
                                           const BlockPlace<kCoarseBlock>& place, float factor,
                                           float* m) {
  M stored = {};
  if (place.count > 0) {
    const uint8_t* codes = packed_codes<M>(p, place.slice, place.at);
#pragma unroll
    for (int i = 0; i < kBits<M>; ++i) {
      if (8 * i < place.count * kBits<M>)
        stored.codes |= static_cast<uint32_t>(codes[i]) << (8 * i);
    }
    load_scales(scales_of<M>(p, place.block), &stored);
  }
  decode_vector(stored, factor, m);
#pragma unroll
  for (int i = 0; i < kVector; ++i) m[i] = i < place.count ? m[i] : 0.0f;
}

// --- writing ----------------------------------------------------------------------------------

// Codes and scales of a block, of whose `size` values a thread has `count`, followed by zeros. All
// threads of the warp take part.
__device__ __forceinline__ Bits4 encode_block(const float* m, int, int, int lanes, Bits4*) {
  uint32_t words[kVector];
  const float none[kVector] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};  // decays
  const float absmax = encode_levels<4>(m, none, false, lanes, words);
  Bits4 stored = {0, scale_bits(absmax)};
#pragma unroll
  for (int i = 0; i < kVector; ++i) stored.codes |= (words[i] & 15u) << (4 * i);
  return stored;
}

__device__ __forceinline__ Bits2 encode_block(const float* m, int count, int size, int lanes,
                                              Bits2*) {
  const auto larger = [](float a, float b) { return ::fmaxf(a, b); };
  const auto sum = [](uint32_t a, uint32_t b) { return a + b; };
  float magnitude[kVector], largest = 0.0f;
  bool zero = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    magnitude[i] = is_finite(m[i]) ? abs(m[i]) : 0.0f;
    largest = ::fmaxf(largest, magnitude[i]);
    zero = zero | (i < count && magnitude[i] == 0.0f);
  }
  const Unit unit = unit_of_block(over_lanes(largest, lanes, larger));
  const uint32_t of_block = (lanes < kCoarseLanes ? 1u << lanes : 1u << kCoarseLanes) - 1;
  const int first_lane = static_cast<int>(threadIdx.x) % kWarp & -lanes;
  const uint32_t zeros = __ballot_sync(0xffffffffu, zero) >> first_lane & of_block;
  // Whole numbers of units stand in the low bits of what is added to 2^23.
  uint32_t whole[kVector], total = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    whole[i] = float_bits(magnitude[i] * unit.inverse + 0x1p23f) - kBytePattern;
    total += whole[i];
  }
  total = over_lanes(total, lanes, sum);
  // Not all values are above their mean: 127 of 2^17 leave the upper eight bits to their count.
  uint32_t above = 0, codes = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const bool is_above = above_mean(whole[i], static_cast<uint32_t>(size), total);
    above += is_above ? whole[i] + (1u << 24) : 0;
    codes |= (is_above ? 1u : 0u) << (2 * i);
  }
  above = over_lanes(above, lanes, sum);
  const Levels levels = levels_of_block(static_cast<float>(total), static_cast<float>(size),
                                        static_cast<float>(above & 0xffffffu),
                                        static_cast<float>(above >> 24), zeros != 0, unit.unit);
  if (!(levels.high > levels.low)) codes = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float level = (codes >> (2 * i) & 1u) != 0 ? levels.high : levels.low;
    codes |= (m[i] < 0.0f && level > 0.0f ? 2u : 0u) << (2 * i);
  }
  return {static_cast<uint16_t>(codes),
          scale_bits(levels.low) | uint32_t{scale_bits(levels.high)} << 16};
}

__device__ __forceinline__ Bits0 encode_block(const float*, int, int, int, Bits0*) {
  return {};
}

__device__ __forceinline__ void store_scales(const Bits0&, uint16_t*) {}
__device__ __forceinline__ void store_scales(const Bits4& m, uint16_t* scales) {
  __stcg(scales, m.scale);
}
__device__ __forceinline__ void store_scales(const Bits2& m, uint16_t* scales) {
  __stcg(scales, static_cast<uint16_t>(m.scales));
  __stcg(scales + 1, static_cast<uint16_t>(m.scales >> 16));
}

// Sets `held` to what is to be kept of m: nothing where the update was zero.
__device__ __forceinline__ void keep(const float* m, const float* idle, float* held) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) held[i] = idle[i] == 0.0f ? 0.0f : m[i];
}

// Stores the new momentum of a thread's part of a block; `held` is then what the code remembers.
template <class M>
__device__ __forceinline__ void store_block(const Parameter& p,
                                            const BlockPlace<kCoarseBlock>& place, float* held) {
  const M stored =
      encode_block(held, place.count, place.size, kCoarseLanes, static_cast<M*>(nullptr));
  decode_vector(stored, 1.0f, held);
  __syncwarp();  // all scales are read before the first is written
  if (place.count == 0) return;
  uint8_t* codes = packed_codes<M>(p, place.slice, place.at);
#pragma unroll
  for (int i = 0; i < kBits<M>; ++i) {
    if (8 * i < place.count * kBits<M>) codes[i] = static_cast<uint8_t>(stored.codes >> (8 * i));
  }
  if (threadIdx.x % kCoarseLanes == 0) store_scales(stored, scales_of<M>(p, place.block));
}

}  // namespace came8bit
