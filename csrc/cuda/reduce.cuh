// Sums in the fixed order that reduction.py states for CUDA: always halving, never by chance.
#pragma once

#include <type_traits>

#include "parameter.h"

namespace came8bit {

// Sums eight values: neighbours first.
__device__ __forceinline__ float sum_vector(const float* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Sum over the `lanes` (a power of two) neighbouring threads of a warp; every one of them gets it.
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}

// Two or four such sums with fewer exchanges: each of the first halvings also halves what a thread
// is responsible for. A thread ends up with the sum of x[which]. There are at least `rows` lanes.
template <int rows, class Lanes>
__device__ __forceinline__ float sum_lanes_of_rows(const float* x, Lanes lanes, int lane,
                                                   int* which) {
  const bool upper = (lane & (lanes / 2)) != 0;
  float sum;
  if constexpr (rows == 2) {
    sum = upper ? x[1] : x[0];
    sum += __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[1], lanes / 2);
    *which = upper ? 1 : 0;
  } else {
    static_assert(rows == 4, "two or four");
    float a = upper ? x[2] : x[0], b = upper ? x[3] : x[1];
    a += __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], lanes / 2);
    b += __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], lanes / 2);
    const bool second = (lane & (lanes / 4)) != 0;
    sum = second ? b : a;
    sum += __shfl_xor_sync(0xffffffffu, second ? a : b, lanes / 4);
    *which = (upper ? 2 : 0) + (second ? 1 : 0);
  }
  if constexpr (std::is_same<Lanes, int>::value) return sum_lanes(sum, lanes / rows);
#pragma unroll
  for (int half = lanes / (2 * rows); half > 0; half /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, half);
  }
  return sum;
}

// A number of lanes that is known when compiling.
template <int n>
struct Constant {
  __host__ __device__ constexpr operator int() const { return n; }
};

// Halves `size` values in shared memory (x[i] += x[i + half]) until `stop` of them are left. All
// threads of the block take part; writes before and reads after are safe.
__device__ __forceinline__ void halve(float* x, int size, int stop) {
  for (int half = size / 2; half >= stop; half /= 2) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) x[i] += x[i + half];
  }
  __syncthreads();
}

// Sum of `count` values by a warp: lane i adds values i, i+32, ... in order, then the lanes.
__device__ __forceinline__ float warp_sum(const float* x, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += x[i];
  return sum_lanes(sum);
}

// The same by a block, whose 256 threads all get the sum; `buffer` holds as many values.
__device__ __forceinline__ float block_sum(const float* x, int64_t count, float* buffer) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += x[i];
  __syncthreads();  // the previous user of the buffer is done
  buffer[threadIdx.x] = sum;
  halve(buffer, kThreads, 1);
  return buffer[0];
}

// How many there are in all; the order of whole numbers does not matter.
__device__ __forceinline__ int64_t block_count(const int* x, int64_t size, float* buffer) {
  int sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) sum += x[i];
  int* counts = reinterpret_cast<int*>(buffer);
  __syncthreads();
  counts[threadIdx.x] = sum;
  __syncthreads();
  int64_t total = 0;
  for (int i = 0; i < kThreads; ++i) total += counts[i];
  return total;
}

// Sum of `count` values that lie `stride` apart, by a thread: stream i adds values i, i+8, ... in
// order, then the streams are halved.
__device__ __forceinline__ float sum_parts(const float* x, int64_t count, int64_t stride) {
  constexpr int streams = 8;
  float sum[streams] = {};
  for (int64_t first = 0; first < count; first += streams) {
#pragma unroll
    for (int i = 0; i < streams; ++i) {
      if (first + i < count) sum[i] += x[(first + i) * stride];
    }
  }
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

}  // namespace came8bit
