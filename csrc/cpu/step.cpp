// The three sweeps of the rule and what stands between them. docs/internals/algorithm.md has the
// passes.
#include "step_common.h"

namespace came8bit {
namespace {

// --- factored ---------------------------------------------------------------------------------

// What is summed up between the sweeps of one parameter. Of a parameter whose rows are on several
// ranks these are sums over all of them when they are read.
struct RowSums {
  float total, r, ratio;  // of g*g, of r, and of the row sums over r
};

// Sweep A and r.
void second_moment(const Parameter& p, const StepSettings& s, const CpuGrid& grid, Workspace& w,
                   int64_t workers) {
  for_each_task(grid.tasks(), workers,
                [&](int64_t task, int64_t) { second_moment_task(p, grid, w, task); });
  add_parts(grid, w, 1);
  kernels().second_moment_ema(w.row_new, p.sq_row, w.row_sum[0], p.b * p.n, static_cast<float>(p.k),
                              s.beta2, s.one_minus_beta2, s.eps1);
}

RowSums row_sums(const Parameter& p, const Workspace& w, int64_t matrix) {
  const Kernels& table = kernels();
  const float *sum = w.row_sum[0] + matrix * p.n, *r = w.row_new + matrix * p.n;
  return {table.lane_sum(sum, p.n), table.lane_sum(r, p.n), table.lane_sum_of_ratios(sum, r, p.n)};
}

// c and the factors of u of one matrix of `rows` rows; returns its predicted sum of squares.
float factors_of_u(const Parameter& p, const StepSettings& s, const Workspace& w, int64_t matrix,
                   const RowSums& sums, int64_t rows) {
  const Kernels& table = kernels();
  const float correction2 = s.correction(1, *p.step + 1), n = static_cast<float>(rows);
  float* c = w.col_new + matrix * p.k;
  const float* sum = w.col_sum[0] + matrix * p.k;
  table.second_moment_ema(c, p.sq_col + matrix * p.k, sum, p.k, n, s.beta2, s.one_minus_beta2,
                          s.eps1);
  table.col_factors(w.col_factor + matrix * p.k, c, p.k, correction2);
  const float mean = sums.r / n;
  table.row_factors(w.row_factor + matrix * p.n, w.row_new + matrix * p.n, p.n, sqrt(mean),
                    s.sign());
  const float col_ratio = table.lane_sum_of_ratios(sum, c, p.k);
  return predicted_square(sums.ratio, col_ratio, mean, correction2, sums.total);
}

// The same for all matrices, where they are whole; returns the sum of what is predicted.
float factors_of_u(const Parameter& p, const StepSettings& s, const Workspace& w) {
  // One value per matrix; the parts of sum 1 are free until sweep B and hold at least b values.
  float* predicted = w.row_part[1];
  for (int64_t i = 0; i < p.b; ++i) {
    predicted[i] = factors_of_u(p, s, w, i, row_sums(p, w, i), p.n);
  }
  return kernels().lane_sum(predicted, p.b);
}

// Sweep B; returns the sum of u*u.
float instability(const Parameter& p, const CpuGrid& grid, Workspace& w, int64_t workers,
                  float kappa_0) {
  // What sweep A read last is still in the caches.
  for_each_task(grid.tasks(), workers, Order::kBackwards,
                [&](int64_t task, int64_t) { instability_task(p, grid, w, kappa_0, task); });
  add_parts(grid, w, 3);
  return kernels().lane_sum(w.row_sum[2], p.b * p.n);
}

// What the full parameter has, and what is known of u.
struct Scales {
  int64_t numel, rows;
  float predicted_rms, kappa_0, kappa;
};

void predict(const Parameter& p, const StepSettings& s, float predicted, Scales& scales) {
  scales.predicted_rms = root_mean(predicted, static_cast<float>(scales.numel));
  scales.kappa_0 = clip_scale(*p.rms_ratio * scales.predicted_rms, s.clip_threshold);
}

// kappa, R and C; writes all statistics and counts the step. The row factor gets the gain.
StepConstants confidence(const Parameter& p, const StepSettings& s, const Workspace& w,
                         float total_u2, Scales& scales) {
  const Kernels& table = kernels();
  const float rms = root_mean(total_u2, static_cast<float>(scales.numel));
  scales.kappa = clip_scale(rms, s.clip_threshold);
  const float delta = scales.kappa - scales.kappa_0;
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  table.instability_ema(p.res_row, w.row_sum[0], w.row_sum[1], w.row_sum[2], rows, delta,
                        static_cast<float>(p.k), s.beta1_squared, s.eps2, s.beta3,
                        s.one_minus_beta3);
  table.instability_ema(p.res_col, w.col_sum[0], w.col_sum[1], w.col_sum[2], cols, delta,
                        static_cast<float>(scales.rows), s.beta1_squared, s.eps2, s.beta3,
                        s.one_minus_beta3);
  std::copy(w.row_new, w.row_new + rows, p.sq_row);
  std::copy(w.col_new, w.col_new + cols, p.sq_col);
  *p.rms_ratio = next_rms_ratio(rms, scales.predicted_rms);
  ++*p.step;
  const StepConstants c = constants_of(p, s, *p.step, scales.kappa);
  table.scale(w.row_factor, rows, c.gain);
  return c;
}

// Sweep C. `scale` is c.scale times the cautious factor; `sum_r` the sum of R of a matrix whose
// rows are on several ranks, or null.
void apply(const Parameter& p, const StepConstants& c, const Workspace& w, int64_t workers,
           float scale, int64_t matrix_rows, const float* sum_r) {
  const Kernels& table = kernels();
  for (int64_t i = 0; i < p.b; ++i) {
    const float* r = p.res_row + i * p.n;
    const float sum = sum_r != nullptr ? *sum_r : table.lane_sum(r, p.n);
    const float mean = sum / static_cast<float>(matrix_rows);
    table.row_factors(w.row_new + i * p.n, r, p.n, sqrt(mean), scale);
  }
  table.col_factors(w.col_new, p.res_col, p.b * p.k, c.correction(2, *p.step));
  apply_all(p, c, {w.row_factor, w.col_factor, w.row_new, w.col_new}, workers);
}

void step_factored(const Parameter& p, const StepSettings& s, Workspace& w, int64_t workers) {
  const CpuGrid grid(p);
  w.lay_out(grid);
  second_moment(p, s, grid, w, workers);
  const float total_g2 = kernels().lane_sum(w.row_sum[0], p.b * p.n);
  give_out(p, total_g2);
  if (skip(p, s, total_g2)) return;
  Scales scales = {p.numel(), p.n, 0.0f, 0.0f, 0.0f};
  predict(p, s, factors_of_u(p, s, w), scales);
  const float total_u2 = instability(p, grid, w, workers, scales.kappa_0);
  if (skip(p, s, total_u2)) return;
  const StepConstants c = confidence(p, s, w, total_u2, scales);
  float scale = c.scale;
  if (s.cautious) {
    const Factors factors = {w.row_factor, w.col_factor, nullptr, nullptr};
    const int64_t agreeing = agreeing_elements(p, c, factors, workers);
    scale = scale * cautious_scale(static_cast<float>(agreeing), static_cast<float>(p.numel()));
  }
  apply(p, c, w, workers, scale, p.n, nullptr);
}

void copy_sums(const double* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(from[i]);
}

void pass_factored(Pass pass, const Shared& p, const StepSettings& s, Workspace& w,
                   int64_t workers) {
  const CpuGrid grid(p);
  w.lay_out(grid, p.work + kKept);
  const bool split = p.full_rows > 0;
  Scales scales = {p.full_numel, split ? p.full_rows : p.n, p.work[kPredictedRms], p.work[kKappa0],
                   p.work[kKappa]};
  if (pass == Pass::kSecondMoment) {
    second_moment(p, s, grid, w, workers);
    if (split) {
      const RowSums sums = row_sums(p, w, 0);
      p.sums[0] = sums.total;
      p.sums[1] = sums.r;
      p.sums[2] = sums.ratio;
      std::copy(w.col_sum[0], w.col_sum[0] + p.k, p.sums + 3);
    } else {
      p.sums[0] = kernels().lane_sum(w.row_sum[0], p.b * p.n);
      p.sums[1] = factors_of_u(p, s, w);
    }
    return;
  }
  if (pass == Pass::kInstability) {
    const float total = static_cast<float>(p.reduced[0]);
    if (leave(p, s, total)) return;
    float predicted = static_cast<float>(p.reduced[1]);
    if (split) {
      copy_sums(p.reduced + 3, p.k, w.col_sum[0]);
      const RowSums sums = {total, predicted, static_cast<float>(p.reduced[2])};
      predicted = factors_of_u(p, s, w, 0, sums, p.full_rows);
    }
    predict(p, s, predicted, scales);
    p.work[kPredictedRms] = scales.predicted_rms;
    p.work[kKappa0] = scales.kappa_0;
    p.sums[0] = instability(p, grid, w, workers, scales.kappa_0);
    for (int i = 0; split && i < 3; ++i) {
      std::copy(w.col_sum[i], w.col_sum[i] + p.k, p.sums + 1 + i * p.k);
    }
    return;
  }
  if (is_left(p)) return;
  if (pass == Pass::kConfidence) {
    const float total = static_cast<float>(p.reduced[0]);
    if (leave(p, s, total)) return;
    for (int i = 0; split && i < 3; ++i) {
      copy_sums(p.reduced + 1 + i * p.k, p.k, w.col_sum[i]);
    }
    const StepConstants c = confidence(p, s, w, total, scales);
    p.work[kKappa] = scales.kappa;
    if (split) p.sums[0] = kernels().lane_sum(p.res_row, p.n);
    if (s.cautious) {
      const Factors factors = {w.row_factor, w.col_factor, nullptr, nullptr};
      p.sums[split ? 1 : 0] = static_cast<double>(agreeing_elements(p, c, factors, workers));
    }
    return;
  }
  if (p.numel() == 0) return;
  const StepConstants c = constants_of(p, s, *p.step, scales.kappa);
  float scale = c.scale;
  if (s.cautious) {
    scale = scale * cautious_scale(static_cast<float>(p.reduced[split ? 1 : 0]),
                                   static_cast<float>(p.full_numel));
  }
  const float sum_r = split ? static_cast<float>(p.reduced[0]) : 0.0f;
  apply(p, c, w, workers, scale, scales.rows, split ? &sum_r : nullptr);
}

}  // namespace

void factored_step(const std::vector<Parameter>& parameters, const StepSettings& settings) {
  step_list(
      parameters, [](const Parameter& p) { return Workspace::floats(CpuGrid(p)); },
      [&](const Parameter& p, Workspace& w, int64_t workers) {
        if (p.numel() != 0) step_factored(p, settings, w, workers);
      });
}

void factored_pass(Pass pass, const std::vector<Shared>& parameters, const StepSettings& settings) {
  step_list(
      parameters, [](const Shared& p) { return Workspace::floats(CpuGrid(p)); },
      [&](const Shared& p, Workspace& w, int64_t workers) {
        pass_factored(pass, p, settings, w, workers);
      });
}

}  // namespace came8bit
