// Toy kernels by which the shim is tested: each is right, or has one mistake that must be noticed.
// They use the launcher of the real ones, and nothing of torch but what that pulls in.
#include <cstdio>
#include <exception>
#include <iterator>

#include "cuda/runtime.h"
// As on a GPU: here, intrinsics take the place of what the shim compiles elsewhere.
#define __CUDA_ARCH__ 900
#include "update.h"
#undef __CUDA_ARCH__

namespace {

constexpr int kThreads = 128;
constexpr int kSide = 32;
constexpr unsigned kAll = 0xffffffffu;

struct Data {
  const float* in;
  float* out;
  int* counters;
  int64_t n;
};

__device__ float warp_sum(float x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(kAll, x, half);
  return x;
}

// --- sum: out[block] = sum of the block's part; the last block adds those up in out[blocks] ----

template <bool barrier, bool fence>
__global__ void sum(Data d) {
  __shared__ float partial[kThreads / 32];
  __shared__ bool is_last;
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const float x = warp_sum(i < d.n ? d.in[i] : 0.0f);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    d.out[blockIdx.x] = total;
    if (fence) __threadfence();
    is_last = atomicAdd(d.counters, 1) == static_cast<int>(gridDim.x) - 1;
    if (fence) __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(d.out + b);
  d.out[gridDim.x] = total;
}

// --- transpose: tiles of 32 x 32; n is the side of the square ----------------------------------

template <bool barrier>
__global__ void transpose(Data d) {
  __shared__ float tile[kSide][kSide + 1];
  const int64_t tiles = d.n / kSide, row = blockIdx.x / tiles * kSide;
  const int64_t column = blockIdx.x % tiles * kSide;
  const int lane = threadIdx.x % kSide, first = threadIdx.x / kSide, step = blockDim.x / kSide;
  for (int r = first; r < kSide; r += step) tile[r][lane] = d.in[(row + r) * d.n + column + lane];
  if (barrier) __syncthreads();
  for (int r = first; r < kSide; r += step) d.out[(column + r) * d.n + row + lane] = tile[lane][r];
}

// Rounds that use the same shared memory again; n rounds. out[i] = sum over rounds of what the
// neighbour had, in[(i + 1) % threads] + round.
template <bool second_barrier>
__global__ void rotate(Data d) {
  __shared__ float buffer[kThreads];
  float total = 0.0f;
  for (int round = 0; round < d.n; ++round) {
    buffer[threadIdx.x] = d.in[threadIdx.x] + static_cast<float>(round);
    __syncthreads();
    total += buffer[(threadIdx.x + 1) % blockDim.x];
    if (second_barrier) __syncthreads();
  }
  d.out[threadIdx.x] = total;
}

// A warp passes values to its neighbours through shared memory.
template <bool sync>
__global__ void exchange(Data d) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x] = d.in[threadIdx.x];
  if (sync) __syncwarp();
  d.out[threadIdx.x] = buffer[threadIdx.x ^ 1];
}

// The same, where a shuffle stands: it makes the lanes meet, but orders no memory.
__global__ void exchange_after_shuffle(Data d) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x] = d.in[threadIdx.x];
  const float zero = __shfl_sync(kAll, 0.0f, 0);
  d.out[threadIdx.x] = buffer[threadIdx.x ^ 1] + zero;
}

// --- intrinsics: out holds what each lane of one warp got --------------------------------------

__global__ void intrinsics(Data d) {
  const int lane = threadIdx.x;
  int row = 0;
  const auto put = [&](double x) { d.out[row++ * 32 + lane] = static_cast<float>(x); };
  put(__shfl_sync(kAll, lane * 10, 5));
  put(__shfl_sync(kAll, lane * 10, lane + 3, 8));
  put(__shfl_xor_sync(kAll, lane, 9));
  put(__shfl_xor_sync(kAll, lane, 8, 8));
  put(__shfl_down_sync(kAll, lane, 4u));
  put(__shfl_down_sync(kAll, lane, 4u, 16));
  put(__shfl_up_sync(kAll, lane, 4u));
  put(__shfl_xor_sync(kAll, lane * 0x100000001ll, 1) >> 32);
  put(__popc(__ballot_sync(kAll, lane % 3 == 0)));
  put(__any_sync(kAll, lane == 31));
  put(__all_sync(kAll, lane < 31));
  put(__reduce_max_sync(kAll, 100u + lane));
  put(__reduce_add_sync(kAll, static_cast<unsigned>(lane)));
  if (lane < 8) {
    put(__shfl_xor_sync(0xffu, lane, 1));
  } else {
    put(-1);
  }
  put(__ffs(8 * lane));
  put(__byte_perm(0x33221100u, 0x77665544u, 0x7052u) == 0x77005522u);
  put(__umulhi(0x80000000u, 6u));
  put(__fadd_rz(1.0f, 0x1.8p-24f) == 1.0f && __fadd_rn(1.0f, 0x1.8p-24f) > 1.0f);
  put(__fadd_rz(-1.0f, 0x1p-30f) == -0x1.fffffep-1f);
  put(__fadd_rz(FLT_MAX, FLT_MAX) == FLT_MAX);
}

__global__ void whole(Data d) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < d.n) d.out[i] = came8bit::whole(d.in[i]);
}

// --- mistakes ----------------------------------------------------------------------------------

__global__ void barrier_in_a_branch(Data d) {
  if (threadIdx.x < 64) __syncthreads();
  d.out[threadIdx.x] = 0.0f;
}
__global__ void two_barriers(Data d) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  d.out[threadIdx.x] = 0.0f;
}
__global__ void shuffle_in_a_branch(Data d) {
  if (threadIdx.x % 32 < 16) d.out[threadIdx.x] = __shfl_xor_sync(kAll, d.in[threadIdx.x], 1);
}
__global__ void shuffle_from_outside(Data d) {
  if (threadIdx.x < 16) d.out[threadIdx.x] = __shfl_xor_sync(0xffffu, d.in[threadIdx.x], 16);
}
__global__ void mask_without_itself(Data d) {
  d.out[threadIdx.x] = __shfl_xor_sync(0xffffu, d.in[threadIdx.x], 1);
}
__global__ void uninitialised(Data d) {
  __shared__ float buffer[kThreads];
  if (threadIdx.x != 7) buffer[threadIdx.x] = 0.0f;
  __syncthreads();
  d.out[threadIdx.x] = buffer[threadIdx.x];
}
__global__ void beyond_shared(Data d) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x + d.n] = 0.0f;
  d.out[threadIdx.x] = buffer[threadIdx.x];
}
__global__ void beyond_global(Data d) {
  d.out[threadIdx.x + d.n] = 0.0f;
}
__global__ void misaligned(Data d) {
  d.out[0] = reinterpret_cast<const float4*>(d.in + 1)->x;
}
__global__ void blocks_write_one_place(Data d) {
  if (threadIdx.x == 0) d.out[0] = static_cast<float>(blockIdx.x);
}
// Works if the two blocks are under way together, and only then.
__global__ void blocks_meet(Data d) {
  if (threadIdx.x != 0) return;
  atomicAdd(d.counters, 1);
  while (atomicAdd(d.counters, 0) < static_cast<int>(gridDim.x)) {
  }
  d.out[blockIdx.x] = 1.0f;
}
// Global memory between a block's threads, in the order of a barrier.
template <bool barrier>
__global__ void through_global(Data d) {
  d.out[threadIdx.x] = d.in[threadIdx.x];
  if (barrier) __syncthreads();
  d.out[kThreads + threadIdx.x] = d.out[(threadIdx.x + 40) % blockDim.x];
}

using Kernel = void (*)(Data);
struct Entry {
  const char* name;
  Kernel kernel;
};
const Entry kKernels[] = {
    {"sum", sum<true, true>},
    {"sum without barrier", sum<false, true>},
    {"sum without fence", sum<true, false>},
    {"transpose", transpose<true>},
    {"transpose without barrier", transpose<false>},
    {"rotate", rotate<true>},
    {"rotate without second barrier", rotate<false>},
    {"exchange", exchange<true>},
    {"exchange without syncwarp", exchange<false>},
    {"exchange after shuffle", exchange_after_shuffle},
    {"intrinsics", intrinsics},
    {"whole", whole},
    {"barrier in a branch", barrier_in_a_branch},
    {"two barriers", two_barriers},
    {"shuffle in a branch", shuffle_in_a_branch},
    {"shuffle from outside", shuffle_from_outside},
    {"mask without itself", mask_without_itself},
    {"uninitialised", uninitialised},
    {"beyond shared", beyond_shared},
    {"beyond global", beyond_global},
    {"misaligned", misaligned},
    {"blocks write one place", blocks_write_one_place},
    {"blocks meet", blocks_meet},
    {"through global", through_global<true>},
    {"through global without barrier", through_global<false>},
};

}  // namespace

// Runs a kernel; returns 0, or 1 with the text of the error in `message`.
extern "C" __attribute__((visibility("default"))) int came8bit_selftest(
    const char* name, unsigned blocks, unsigned threads, const float* in, float* out, int* counters,
    int64_t n, char* message, size_t capacity) {
  try {
    for (const Entry& entry : kKernels) {
      if (strcmp(entry.name, name) != 0) continue;
      came8bit::launch(entry.kernel, blocks, threads, nullptr, Data{in, out, counters, n});
      return 0;
    }
    throw std::runtime_error(std::string("no kernel ") + name);
  } catch (const std::exception& error) {
    snprintf(message, capacity, "%s", error.what());
    return 1;
  }
}
