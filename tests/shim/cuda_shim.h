// The part of CUDA C++ that csrc/cuda uses, for a C++ compiler, so that the same kernels and
// launchers run on a CPU. For tests only.
//
// Each thread of a block is a fiber, and all fibers of a block share one OS thread: so `__shared__`
// is storage of that OS thread. Several blocks run at once, on several OS threads. Fibers change
// places at barriers, warp operations and atomics, in an order that tests choose (block.cpp,
// grid.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_scalars.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // empty: the C++ library writes __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local

// --- execution (block.cpp, grid.cpp) -----------------------------------------------------------

namespace came8bit_shim {

struct Dim {
  unsigned x, y, z;
};

// Where a thread stands in its grid.
struct Place {
  Dim thread, block, block_dim, grid_dim;
};

enum class WarpOp { kShuffle, kBallot, kAny, kAll, kMax, kMin, kAdd, kAnd, kOr, kXor, kSync };

struct Site {
  const char* file;
  int line;
};

// All that the shim itself keeps per OS thread: the rest of that storage is __shared__.
struct ThreadState {
  const Place* place;
  void* thread;
  void* block;
  void* last_context;
};
extern __thread ThreadState thread_state;

// `value` is what the lane brings; `source` the lane it reads from in a shuffle.
uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, int source, Site site);
void block_barrier(Site site);
void fence();
void before_atomic(void* address);
void after_atomic(void* address);

int lane();
int64_t l2_bytes();
bool large_arguments();

// Calls body(closure) once for each thread of the grid; throws std::runtime_error for a launch that
// a GPU would refuse and for threads that wait for each other in vain. `kernel` is only recorded.
void run(const void* kernel, unsigned blocks, unsigned threads, void (*body)(void*), void* closure);

template <class... P>
void run_grid(void (*kernel)(P...), unsigned blocks, unsigned threads, const P&... arguments) {
  auto body = [&] { kernel(arguments...); };  // each thread has its own copies
  run(
      reinterpret_cast<const void*>(kernel), blocks, threads,
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width, Site site) {
  const int own = lane(), segment = own & ~(width - 1);
  const bool inside = source >= segment && source < segment + width;
  return from_word<T>(
      warp_operation(WarpOp::kShuffle, mask, to_word(value), inside ? source : own, site));
}

}  // namespace came8bit_shim

#define threadIdx (came8bit_shim::thread_state.place->thread)
#define blockIdx (came8bit_shim::thread_state.place->block)
#define blockDim (came8bit_shim::thread_state.place->block_dim)
#define gridDim (came8bit_shim::thread_state.place->grid_dim)

constexpr int warpSize = 32;

// Defaults that name the line of the call.
#define CAME8BIT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CAME8BIT_SITE) {
  came8bit_shim::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CAME8BIT_SITE) {
  came8bit_shim::warp_operation(came8bit_shim::WarpOp::kSync, mask, 0, 0, {file, line});
}
inline void __threadfence() {
  came8bit_shim::fence();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CAME8BIT_SITE) {
  const int own = came8bit_shim::lane();
  const int wrapped = (own & ~(width - 1)) | (source & (width - 1));
  return came8bit_shim::shuffle(mask, value, wrapped, width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CAME8BIT_SITE) {
  const int source = came8bit_shim::lane() ^ lane_mask;
  // A segment further up is out of reach, one further down is not.
  const int end = (came8bit_shim::lane() & ~(width - 1)) + width;
  return came8bit_shim::from_word<T>(came8bit_shim::warp_operation(
      came8bit_shim::WarpOp::kShuffle, mask, came8bit_shim::to_word(value),
      source < end ? source : came8bit_shim::lane(), {file, line}));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CAME8BIT_SITE) {
  const int source = came8bit_shim::lane() + static_cast<int>(delta);
  return came8bit_shim::shuffle(mask, value, source, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CAME8BIT_SITE) {
  const int source = came8bit_shim::lane() - static_cast<int>(delta);
  return came8bit_shim::shuffle(mask, value, source, width, {file, line});
}

#define CAME8BIT_VOTE(name, op, Result)                                                         \
  inline Result name(unsigned mask, int predicate, CAME8BIT_SITE) {                             \
    return static_cast<Result>(came8bit_shim::warp_operation(came8bit_shim::WarpOp::op, mask,   \
                                                             predicate != 0, 0, {file, line})); \
  }
CAME8BIT_VOTE(__ballot_sync, kBallot, unsigned)
CAME8BIT_VOTE(__any_sync, kAny, int)
CAME8BIT_VOTE(__all_sync, kAll, int)
#undef CAME8BIT_VOTE

#define CAME8BIT_REDUCE(name, op)                                                                \
  inline unsigned name(unsigned mask, unsigned value, CAME8BIT_SITE) {                           \
    return static_cast<unsigned>(                                                                \
        came8bit_shim::warp_operation(came8bit_shim::WarpOp::op, mask, value, 0, {file, line})); \
  }
CAME8BIT_REDUCE(__reduce_max_sync, kMax)
CAME8BIT_REDUCE(__reduce_min_sync, kMin)
CAME8BIT_REDUCE(__reduce_add_sync, kAdd)
CAME8BIT_REDUCE(__reduce_and_sync, kAnd)
CAME8BIT_REDUCE(__reduce_or_sync, kOr)
CAME8BIT_REDUCE(__reduce_xor_sync, kXor)
#undef CAME8BIT_REDUCE
#undef CAME8BIT_SITE

// --- atomics: whole numbers only, sums of floats would depend on the order ---------------------

namespace came8bit_shim {

template <class T, class F>
T atomically(T* address, F change) {
  static_assert(std::is_integral<T>::value, "only atomics on integers");
  before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, change(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}

}  // namespace came8bit_shim

#define CAME8BIT_ATOMIC(name, expression)                           \
  template <class T>                                                \
  T name(T* address, std::common_type_t<T> value) {                 \
    return came8bit_shim::atomically(address, [value](T old) -> T { \
      static_cast<void>(old);                                       \
      return expression;                                            \
    });                                                             \
  }
CAME8BIT_ATOMIC(atomicAdd, static_cast<T>(old + value))
CAME8BIT_ATOMIC(atomicExch, value)
CAME8BIT_ATOMIC(atomicMax, old < value ? value : old)
CAME8BIT_ATOMIC(atomicMin, value < old ? value : old)
CAME8BIT_ATOMIC(atomicOr, static_cast<T>(old | value))
CAME8BIT_ATOMIC(atomicAnd, static_cast<T>(old& value))
#undef CAME8BIT_ATOMIC

// --- memory ------------------------------------------------------------------------------------

#define CAME8BIT_LOAD(name)  \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
CAME8BIT_LOAD(__ldg)
CAME8BIT_LOAD(__ldca)
CAME8BIT_LOAD(__ldcg)
CAME8BIT_LOAD(__ldcs)
CAME8BIT_LOAD(__ldlu)
CAME8BIT_LOAD(__ldcv)
#undef CAME8BIT_LOAD

#define CAME8BIT_STORE(name)                           \
  template <class T>                                   \
  void name(T* address, std::common_type_t<T> value) { \
    *address = value;                                  \
  }
CAME8BIT_STORE(__stcg)
CAME8BIT_STORE(__stcs)
CAME8BIT_STORE(__stwb)
CAME8BIT_STORE(__stwt)
#undef CAME8BIT_STORE

// --- runtime API: there is one stream, and what is put on it is done at once -------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes > 0) memcpy(to, from, bytes);
  return cudaSuccess;
}
