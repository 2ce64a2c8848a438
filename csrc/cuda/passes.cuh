// What the passes of a step have in place of the small kernels between its sweeps. Sums over rows
// that may be on other ranks go out as `sums` and come back as `reduced`; the sweeps are the same.
#pragma once

#include "kernels.cuh"

namespace came8bit {

// A parameter and what a pass is given besides.
struct PassParameter {
  Parameter parameter;
  SharedArguments shared;
};

// What stays of a factored parameter between the passes, in `work`. Columns come first: `work` and
// vectors of them are aligned.
struct KeptArrays {
  float *col_new, *col_factor, *row_new,
      *row_gain;             // row_gain: the factor of u until kappa is known
  float *col_sum, *row_sum;  // [3][b][k], [3][b][n]: of d*d, u*d, u*u; then update_col, root_mean
  float* root_mean;          // [b], of r or R, where there are no row sums to keep

  CAME8BIT_INLINE KeptArrays(const Parameter& p, float* work) {
    const int64_t rows = p.b * p.n, cols = p.b * p.k;
    col_new = work + kKept;
    col_factor = col_new + cols;
    col_sum = col_factor + cols;
    row_new = col_sum + 3 * cols;
    row_gain = row_new + rows;
    root_mean = row_sum = row_gain + rows;
  }
};

// Whether other ranks may have rows of the matrix.
CAME8BIT_INLINE bool is_split(const SharedArguments& shared) {
  return shared.full_rows > 0;
}
// Elements of a column.
CAME8BIT_INLINE float rows_of(const Parameter& p, const SharedArguments& shared) {
  return static_cast<float>(is_split(shared) ? shared.full_rows : p.n);
}
// Sums are float64, so that the order in which ranks are added does not matter.
CAME8BIT_INLINE float reduced(const SharedArguments& shared, int64_t i) {
  return static_cast<float>(shared.reduced[i]);
}

// Blocks of the kernels that have a warp for each chunk of rows or columns: one has the total.
CAME8BIT_INLINE int64_t pass_tasks(const Parameter& p) {
  return p.combine_tasks() > 0 ? p.combine_tasks() : 1;
}

// --- when a pass begins -----------------------------------------------------------------------

// Whether the parameter stays in the step; notes and counts it if a sum is not finite.
__device__ __forceinline__ int stays(const Parameter& p, const SharedArguments& shared,
                                     const StepSettings& s) {
  const bool alive = s.propagate || is_finite(reduced(shared, 0));
  shared.work[kLeft] = alive ? 0.0f : 1.0f;
  if (!alive) ++*p.skipped;
  return alive ? 1 : 0;
}

// What is known of a parameter when a pass begins. The third one counts the step.
__device__ __forceinline__ Scalars scalars_of_pass(const Parameter& p,
                                                   const SharedArguments& shared,
                                                   const StepSettings& s, Pass pass) {
  Scalars scalars = scalars_of_step(s, *p.step + (pass == Pass::kApply ? 0 : 1));
  scalars.shared = shared;
  scalars.decided = scalars.alive = scalars.u_finite = 1;
  if (pass == Pass::kSecondMoment) return scalars;
  if (pass == Pass::kInstability) {
    scalars.alive = stays(p, shared, s);
    return scalars;
  }
  float* work = shared.work;
  const float numel = static_cast<float>(shared.full_numel);
  scalars.alive = work[kLeft] == 0.0f ? 1 : 0;
  if (scalars.alive && pass == Pass::kConfidence) scalars.alive = stays(p, shared, s);
  if (!scalars.alive) return scalars;
  if (pass == Pass::kApply) {
    scalars.kappa = work[kKappa];
    if (s.cautious) {
      const float agreeing = reduced(shared, is_split(shared) ? 1 : 0);
      scalars.lr_scale = scalars.lr_scale * cautious_scale(agreeing, numel);
    }
    return scalars;
  }
  scalars.rms = root_mean(reduced(shared, 0), numel);
  scalars.kappa = work[kKappa] = clip_scale(scalars.rms, s.clip_threshold);
  if (p.rms_ratio.pointer != nullptr) {
    scalars.kappa_0 = work[kKappa0];
    *p.rms_ratio = next_rms_ratio(scalars.rms, work[kPredictedRms]);
  }
  ++*p.step;
  return scalars;
}

// Writes parameters to the workspace, and what is known of them.
template <class PassBatch>
__global__ void __launch_bounds__(kThreads)
    describe_pass(PassBatch batch, int count, StepSettings s, Pass pass, Parameter* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const PassParameter& item = batch.items[i];
    out[i] = item.parameter;
    *item.parameter.scalars = scalars_of_pass(item.parameter, item.shared, s, pass);
  }
}

// --- second moment ----------------------------------------------------------------------------

// Behind sweep A. Of a matrix that is not whole, c has to wait for the sums of all rows.
__global__ void __launch_bounds__(kThreads)
    pass_second_moment_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  const Chunk chunk(p, find_task(parameters, count, kCombine, blockIdx.x, &p));
  if (!chunk.there) return;
  const SharedArguments& shared = p.scalars->shared;
  const float sum = chunk.sum(p, 0);
  if (chunk.is_row || !is_split(shared)) {
    second_moment_chunk(p, s, chunk, sum, static_cast<float>(chunk.is_row ? p.k : p.n));
  } else if (chunk.i < chunk.size) {
    shared.sums[3 + chunk.i] = sum;
  }
}

// One block per parameter.
__global__ void __launch_bounds__(kThreads) pass_matrix_sums_kernel(const Parameter* parameters) {
  __shared__ Parameter p;
  copy_parameter(parameters[blockIdx.x], &p);
  const SharedArguments& shared = p.scalars->shared;
  if (!is_split(shared)) {
    const Totals totals = sum_matrices(p);
    if (threadIdx.x != 0) return;
    shared.sums[0] = totals.total;
    shared.sums[1] = totals.predicted;
    return;
  }
  const int64_t warp = threadIdx.x / kWarp, chunks = p.row_chunks();
  if (warp >= 3) return;
  const float sum = warp_sum(p.row_chunk + warp * chunks, chunks);
  if (threadIdx.x % kWarp == 0) shared.sums[warp] = sum;
}

// --- instability ------------------------------------------------------------------------------

// Of matrices that are not whole: c and the column factors.
__global__ void __launch_bounds__(kThreads)
    pass_columns_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  const Chunk chunk(p, find_task(parameters, count, kCombine, blockIdx.x, &p));
  const SharedArguments& shared = p.scalars->shared;
  if (!is_split(shared) || !p.scalars->alive || !chunk.there || chunk.is_row) return;
  const float sum = chunk.i < chunk.size ? reduced(shared, 3 + chunk.i) : 0.0f;
  second_moment_chunk(p, s, chunk, sum, rows_of(p, shared));
}

// One block per parameter: what sweep B has to know.
__global__ void __launch_bounds__(kThreads)
    pass_prediction_kernel(const Parameter* parameters, StepSettings s) {
  __shared__ Parameter p;
  copy_parameter(parameters[blockIdx.x], &p);
  Scalars& scalars = *p.scalars;
  const SharedArguments& shared = scalars.shared;
  if (!scalars.alive) return;
  float predicted = reduced(shared, 1);
  if (is_split(shared)) {
    if (threadIdx.x >= kWarp) return;
    const float col_ratio = warp_sum(p.col_chunk, p.col_chunks());
    if (threadIdx.x != 0) return;
    predicted = predict(p, 0, rows_of(p, shared),
                        {reduced(shared, 0), predicted, reduced(shared, 2), col_ratio});
  } else {
    const float* root_mean = KeptArrays(p, shared.work).root_mean;
    for (int64_t i = threadIdx.x; i < p.b; i += kThreads) p.root_mean[i] = root_mean[i];
    if (threadIdx.x != 0) return;
  }
  expect(p, s, predicted, static_cast<float>(shared.full_numel));
  shared.work[kPredictedRms] = scalars.predicted_rms;
  shared.work[kKappa0] = scalars.kappa_0;
}

// Behind sweep B: keeps row sums, hands out the others.
__global__ void __launch_bounds__(kThreads)
    pass_instability_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  const int64_t task = find_task(parameters, count, kCombine, blockIdx.x, &p);
  const SharedArguments& shared = p.scalars->shared;
  if (!p.scalars->alive) {
    for (int64_t i = task * kThreads + threadIdx.x; i < shared.sums_size;
         i += pass_tasks(p) * kThreads) {
      shared.sums[i] = 0.0;
    }
    return;
  }
  if (task == 0) {
    const float total_u2 = block_sum(p.tile_sum, p.tile_sums(), buffer);
    if (threadIdx.x == 0) shared.sums[0] = total_u2;
  }
  const Chunk chunk(p, task);
  if (!chunk.there || chunk.i >= chunk.size) return;
  const KeptArrays kept(p, shared.work);
  const int64_t at = chunk.matrix * chunk.size + chunk.i;
  for (int which = 0; which < 3; ++which) {
    const float sum = chunk.sum(p, which);
    if (chunk.is_row) {
      kept.row_sum[which * p.b * p.n + at] = sum;
    } else if (is_split(shared)) {
      shared.sums[1 + which * p.k + at] = sum;
    } else {
      kept.col_sum[which * p.b * p.k + at] = sum;
    }
  }
  if (chunk.is_row) {
    kept.row_gain[at] = row_factor(p.row_new[at], p.root_mean[chunk.matrix], s.sign());
  }
}

// --- confidence -------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    pass_confidence_kernel(const Parameter* parameters, int count, StepSettings s) {
  __shared__ Parameter p;
  const Chunk chunk(p, find_task(parameters, count, kCombine, blockIdx.x, &p));
  const Scalars& scalars = *p.scalars;
  const SharedArguments& shared = scalars.shared;
  if (!scalars.alive || !chunk.there) return;
  const KeptArrays kept(p, shared.work);
  const int64_t at = chunk.matrix * chunk.size + chunk.i;
  float sums[3] = {};
  for (int i = 0; i < 3 && chunk.i < chunk.size; ++i) {
    if (chunk.is_row) {
      sums[i] = kept.row_sum[i * p.b * p.n + at];
    } else if (is_split(shared)) {
      sums[i] = reduced(shared, 1 + i * p.k + at);
    } else {
      sums[i] = kept.col_sum[i * p.b * p.k + at];
    }
  }
  const float count_of = chunk.is_row ? static_cast<float>(p.k) : rows_of(p, shared);
  instability_chunk(p, s, chunk, sums[0], sums[1], sums[2], count_of, scalars.kappa,
                    [&](int64_t row) { return kept.row_gain[row]; });
}

// One block per parameter: the sum of R, or the root of its mean over each matrix, and how many
// elements agree in `tiles` of them.
__device__ __forceinline__ void sum_confidence(const Parameter& p, const StepSettings& s,
                                               int64_t tiles, float* buffer) {
  const SharedArguments& shared = p.scalars->shared;
  if (!p.scalars->alive) {
    if (threadIdx.x < shared.sums_size) shared.sums[threadIdx.x] = 0.0;
    return;
  }
  const bool factored = p.rms_ratio.pointer != nullptr, split = is_split(shared);
  const KeptArrays kept(p, shared.work);
  for (int64_t i = threadIdx.x / kWarp; factored && i < p.b; i += kWarps) {
    const float total = warp_sum(p.row_chunk + i * p.row_chunks(), p.row_chunks());
    if (threadIdx.x % kWarp != 0) continue;
    if (split) {
      shared.sums[0] = total;
    } else {
      kept.root_mean[i] = root_mean(total, static_cast<float>(p.n));
    }
  }
  if (!s.cautious) return;
  const int64_t agreeing = block_count(p.agreeing, tiles, buffer);
  if (threadIdx.x == 0) shared.sums[split ? 1 : 0] = static_cast<double>(agreeing);
}

__global__ void __launch_bounds__(kThreads)
    pass_confidence_sums_kernel(const Parameter* parameters, StepSettings s, Access access) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  copy_parameter(parameters[blockIdx.x], &p);
  const bool factored = p.rms_ratio.pointer != nullptr;
  sum_confidence(p, s, factored ? apply_tasks(p, access) : flat_apply_tasks(p), buffer);
}

// --- apply ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    pass_update_rows_kernel(const Parameter* parameters, int count) {
  __shared__ Parameter p;
  const int64_t task = find_task(parameters, count, kRows, blockIdx.x, &p);
  const Scalars& scalars = *p.scalars;
  const SharedArguments& shared = scalars.shared;
  const int64_t tasks = (p.n + kThreads - 1) / kThreads;
  const int64_t matrix = task / tasks, row = task % tasks * kThreads + threadIdx.x;
  if (!scalars.alive || row >= p.n) return;
  const float root = is_split(shared) ? root_mean(reduced(shared, 0), rows_of(p, shared))
                                      : KeptArrays(p, shared.work).root_mean[matrix];
  const int64_t at = matrix * p.n + row;
  p.update_row[at] = row_factor(p.res_row[at], root, scalars.lr_scale);
}

// --- unfactored -------------------------------------------------------------------------------

// One block per parameter: the sum of what the tiles have of g*g, or (`of_u`) of u*u.
__global__ void __launch_bounds__(kThreads)
    pass_flat_sums_kernel(const Parameter* parameters, bool of_u) {
  __shared__ Parameter p;
  __shared__ float buffer[kThreads];
  copy_parameter(parameters[blockIdx.x], &p);
  const int64_t tiles = flat_tiles(p);
  const float total = block_sum(p.tile_sum + (of_u ? tiles : 0), tiles, buffer);
  if (threadIdx.x == 0) p.scalars->shared.sums[0] = p.scalars->alive ? total : 0.0f;
}

}  // namespace came8bit
