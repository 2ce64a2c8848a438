// The codec alone: quantize_blockwise, dequantize_blockwise.
#include "codec.cuh"

#include "step.h"

namespace came8bit {
namespace {

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const float* x, int64_t slices, int64_t slice_len, int8_t* codes,
                    float* absmax) {
  const BlockPlace<kBlockSize> place(slices, slice_len, blockIdx.x);
  float m[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) m[i] = i < place.count ? x[place.first + i] : 0.0f;
  float none[kVector];  // decays
#pragma unroll
  for (int i = 0; i < kVector; ++i) none[i] = 1.0f;
  uint2 out;
  const float largest = encode_vector(m, none, true, kWarp, &out);
  if (place.block < 0) return;
  store_codes(out, place, codes);
  if (threadIdx.x % kWarp == 0) absmax[place.block] = largest;
}

__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                      float* x) {
  const BlockPlace<kBlockSize> place(slices, slice_len, blockIdx.x);
  if (place.block < 0) return;
  const float scale = absmax[place.block];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < place.count) x[place.first + i] = decode_one(codes[place.first + i], scale);
  }
}

unsigned blocks_of(int64_t slices, int64_t slice_len) {
  const int64_t blocks = slices * ((slice_len + kBlockSize - 1) / kBlockSize);
  const int64_t launched = (blocks + kWarps - 1) / kWarps;
  STD_TORCH_CHECK(launched <= INT32_MAX, "got a tensor of ", blocks,
                  " blocks of the 8-bit code, expected at most ", int64_t{INT32_MAX} * kWarps,
                  "; code it in parts");
  return static_cast<unsigned>(launched);
}

}  // namespace

void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax,
              cudaStream_t stream) {
  const unsigned blocks = blocks_of(slices, slice_len);
  if (blocks == 0) return;
  launch(quantize_kernel, blocks, kThreads, stream, x, slices, slice_len, codes, absmax);
}

void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x, cudaStream_t stream) {
  const unsigned blocks = blocks_of(slices, slice_len);
  if (blocks == 0) return;
  launch(dequantize_kernel, blocks, kThreads, stream, codes, absmax, slices, slice_len, x);
}

}  // namespace came8bit
