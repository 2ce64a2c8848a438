// The kernels: each finds its parameter and task and calls the phase that the other files write
// out. docs/internals/kernels.md shows the launches of a step in a row.
#pragma once

#include "unfactored.cuh"

namespace came8bit {

// A block's own copy of its parameter, so that its fields are read from shared memory.
__device__ __forceinline__ void copy_parameter(const Parameter& from, Parameter* to) {
  const uint64_t* in = reinterpret_cast<const uint64_t*>(&from);
  uint64_t* out = reinterpret_cast<uint64_t*>(to);
  constexpr unsigned words = sizeof(Parameter) / sizeof(uint64_t);
  static_assert(words * sizeof(uint64_t) == sizeof(Parameter) && words <= kThreads,
                "a word of eight bytes by each thread");
  if (threadIdx.x < words) out[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
}

// Copies the parameter that owns block `block` of a phase's launch; returns the task within it.
__device__ __forceinline__ int64_t find_task(const Parameter* parameters, int count, Phase phase,
                                             int64_t block, Parameter* parameter) {
  __shared__ int found;
  // The last parameter whose first block is not behind this one: exactly one thread sees it.
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const bool begun = parameters[i].first[phase] <= block;
    const bool next_begun = i + 1 < count && parameters[i + 1].first[phase] <= block;
    if (begun && !next_begun) found = i;
  }
  __syncthreads();
  copy_parameter(parameters[found], parameter);
  return block - parameter->first[phase];
}

// --- before the first sweep -------------------------------------------------------------------

// Kernel arguments are copied when a launch is queued or captured, so they carry the parameters.
constexpr int kSmallBatchBytes = 3800;  // of 4 KB
#if defined(CAME8BIT_SHIM) || CUDART_VERSION >= 12010
constexpr int kLargeBatchBytes = 32000;  // of 32 KB: DeviceProperties::large_arguments
#else
constexpr int kLargeBatchBytes = kSmallBatchBytes;
#endif

template <class Item, int bytes>
struct Batch {
  static constexpr int kSize = bytes / static_cast<int>(sizeof(Item));
  Item items[kSize];
};

// Writes strides to the workspace.
template <class StridesBatch>
__global__ void __launch_bounds__(kThreads)
    describe_strides(StridesBatch batch, int count, Strides* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) out[i] = batch.items[i];
}

// What does not depend on gradients.
__device__ __forceinline__ Scalars scalars_of_step(const StepSettings& s, int64_t step) {
  const StepSettings::Rate rate = s.rate();
  Scalars scalars = {};
  scalars.step = static_cast<uint32_t>(step);
  scalars.lr_scale = rate.lr / s.direction_correction(step);
  scalars.shrink = rate.shrink;
  scalars.spent = s.spent(step);
  scalars.correction2 = s.correction(1, step);
  scalars.correction3 = s.correction(2, step);
  return scalars;
}

// Writes parameters to the workspace, and the scalars of this step.
template <class ParameterBatch>
__global__ void __launch_bounds__(kThreads)
    describe(ParameterBatch batch, int count, StepSettings s, Parameter* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const Parameter& p = batch.items[i];
    out[i] = p;
    *p.scalars = scalars_of_step(s, *p.step + 1);
  }
}

// --- factored ---------------------------------------------------------------------------------

template <class G, bool fast>
__global__ void __launch_bounds__(kThreads, fast ? 4 : 1)
    second_moment_kernel(const Parameter* parameters, int count) {
  __shared__ Parameter p;
  __shared__ float buffer[kRoundVectors];
  const int64_t task = find_task(parameters, count, kSweepA, blockIdx.x, &p);
  second_moment_tile<G, fast>(p, task, buffer);
}

__global__ void __launch_bounds__(kThreads, 4)  // or else ptxas spills to save registers
    second_moment_combine_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  const int64_t task = find_task(parameters, count, kCombine, blockIdx.x, &p);
  second_moment_combine(p, s, task);
}

// One block per parameter.
__global__ void __launch_bounds__(kThreads)
    second_moment_scalars_kernel(const Parameter* parameters, StepSettings s) {
  __shared__ Parameter p;
  copy_parameter(parameters[blockIdx.x], &p);
  second_moment_scalars(p, s);
}

// Walks backwards: what sweep A read last is still in the cache. With 2-bit momentum ptxas would
// spill to save registers.
template <class G, class M, bool fast>
__global__ void __launch_bounds__(kThreads, fast && !std::is_same<M, Bits2>::value ? 2 : 1)
    instability_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kRoundVectors];
  __shared__ float row_factors[kMaxSlabRows];
  const int64_t task =
      find_task(parameters, count, kSweepA, int64_t{gridDim.x} - 1 - blockIdx.x, &p);
  if (!p.scalars->alive) return;
  instability_tile<G, M, fast>(p, s, task, buffer, row_factors);
}

__global__ void __launch_bounds__(kThreads, 1)  // or else ptxas spills to save registers
    instability_combine_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kCombine, blockIdx.x, &p);
  if (!p.scalars->alive) return;
  float kappa;
  if (find_kappa(p, s, task == 0, buffer, &kappa)) instability_combine(p, s, task, kappa);
}

template <class M, Access access>
__global__ void __launch_bounds__(kThreads, 3)
    agreeing_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kSweepC, blockIdx.x, &p);
  if (!p.scalars->alive || !p.scalars->u_finite) return;
  const int found = apply_task<Any, Any, M, access, true>(p, s, task);
  store_count(found, p.agreeing + task, buffer);
}

__global__ void __launch_bounds__(kThreads)
    update_rows_kernel(const Parameter* parameters, int count, StepSettings s, Access access) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kRows, blockIdx.x, &p);
  update_rows(p, s, task, apply_tasks(p, access), buffer);
}

template <class P, class G, class M, Access access>
__global__ void __launch_bounds__(kThreads, access == kTiles ? 2 : 1)
    apply_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  const int64_t task = find_task(parameters, count, kSweepC, blockIdx.x, &p);
  if (!p.scalars->alive || !p.scalars->u_finite) return;
  apply_task<P, G, M, access, false>(p, s, task);
}

// All of it for one small parameter per block.
template <class M>
__global__ void __launch_bounds__(kThreads, 1)
    small_factored_kernel(const Parameter* parameters, StepSettings s) {
  constexpr bool fast = true;
  __shared__ Parameter p;
  __shared__ float buffer[kRoundVectors];
  __shared__ float row_factors[kMaxSlabRows];
  copy_parameter(parameters[blockIdx.x], &p);
  const int64_t apply_count = apply_tasks(p, kTiles);
  for (int64_t task = 0; task < p.tiles(); ++task) second_moment_tile<Any, fast>(p, task, buffer);
  __syncthreads();
  for (int64_t task = 0; task < p.combine_tasks(); ++task) second_moment_combine(p, s, task);
  __syncthreads();
  second_moment_scalars(p, s);
  __syncthreads();
  const bool alive = p.scalars->alive;
  if (alive) {
    for (int64_t task = 0; task < p.tiles(); ++task) {
      instability_tile<Any, M, fast>(p, s, task, buffer, row_factors);
    }
    __syncthreads();
    float kappa;
    if (find_kappa(p, s, true, buffer, &kappa)) {
      for (int64_t task = 0; task < p.combine_tasks(); ++task)
        instability_combine(p, s, task, kappa);
    }
    __syncthreads();
  }
  const bool done = alive && p.scalars->u_finite;
  if (done && s.cautious) {
    for (int64_t task = 0; task < apply_count; ++task) {
      const int found = apply_task<Any, Any, M, kTiles, true>(p, s, task);
      store_count(found, p.agreeing + task, buffer);
    }
    __syncthreads();
  }
  const int64_t row_tasks = p.b * ((p.n + kThreads - 1) / kThreads);
  for (int64_t task = 0; task < row_tasks; ++task) {
    update_rows(p, s, task, apply_count, buffer);
    __syncthreads();
  }
  if (!done) return;
  for (int64_t task = 0; task < apply_count; ++task) {
    apply_task<Any, Any, M, kTiles, false>(p, s, task);
  }
}

// --- unfactored -------------------------------------------------------------------------------

template <bool fast, bool of_u>
__global__ void __launch_bounds__(kThreads, 1)
    flat_sum_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kSweepA, blockIdx.x, &p);
  if (of_u && !flat_alive(p, s, buffer, task == 0)) return;
  flat_sum_tile<fast, of_u>(p, s, task, buffer);
}

template <class M, bool fast>
__global__ void __launch_bounds__(kThreads, 3)
    flat_agreeing_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kSweepC, blockIdx.x, &p);
  const FlatState state = flat_state(p, s, 0, buffer);
  if (!state.done) return;
  const int found = apply_flat_blocks<M, fast, true>(p, s, state, task);
  store_count(found, p.agreeing + task, buffer);
}

template <class M, bool fast>
__global__ void __launch_bounds__(kThreads, 3)
    flat_apply_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kSweepC, blockIdx.x, &p);
  const FlatState state = flat_state(p, s, flat_apply_tasks(p), buffer);
  // The others know the step from `scalars`, which stays as it is.
  if (task == 0 && threadIdx.x == 0) close_books(p, state.done);
  if (state.done) apply_flat_blocks<M, fast, false>(p, s, state, task);
}

__global__ void __launch_bounds__(kThreads, 1)
    small_flat_kernel(const Parameter* parameters, StepSettings s) {
  using M = float;
  constexpr bool fast = true;
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  copy_parameter(parameters[blockIdx.x], &p);
  const int64_t tiles = flat_tiles(p), tasks = flat_apply_tasks(p);
  for (int64_t task = 0; task < tiles; ++task) flat_sum_tile<fast, false>(p, s, task, buffer);
  __syncthreads();
  if (flat_alive(p, s, buffer, true)) {
    for (int64_t task = 0; task < tiles; ++task) flat_sum_tile<fast, true>(p, s, task, buffer);
    __syncthreads();
  }
  FlatState state = flat_state(p, s, 0, buffer);
  if (state.done && s.cautious) {
    for (int64_t task = 0; task < tasks; ++task) {
      const int found = apply_flat_blocks<M, fast, true>(p, s, state, task);
      store_count(found, p.agreeing + task, buffer);
    }
    __syncthreads();
    state = flat_state(p, s, tasks, buffer);
  }
  if (threadIdx.x == 0) close_books(p, state.done);
  if (!state.done) return;
  for (int64_t task = 0; task < tasks; ++task) {
    apply_flat_blocks<M, fast, false>(p, s, state, task);
  }
}

}  // namespace came8bit
