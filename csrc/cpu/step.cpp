// The three sweeps of the rule and what stands between them. docs/internals/algorithm.md has the
// passes.
#include "step.h"

#include <cmath>

#include "blocks.h"
#include "parallel.h"
#include "tiles.h"

namespace came8bit {
namespace {

// Parameters up to this size are stepped by one thread each, larger ones by all threads together.
constexpr int64_t kSerialElements = 1 << 16;
constexpr int64_t kChunksPerTask = 16;

StepConstants constants_of(const Parameter& p, const StepSettings& s, int64_t step, float kappa) {
  StepConstants c = {
      s,       gain(kappa, s.one_minus_beta1), s.correction(1, step), 0.0f, s.spent(step),
      p.index, static_cast<uint32_t>(step)};
  const StepSettings::Rate rate = s.rate();
  c.lr = rate.lr;
  c.shrink = rate.shrink;
  c.scale = rate.lr / s.direction_correction(step);
  return c;
}

// Keeps the sum of squares of the gradient for whoever wants it.
void give_out(const Parameter& p, float total_g2) {
  if (p.grad_square != nullptr) *p.grad_square = total_g2;
}

// Whether the step has to be left out because a sum is not finite; counts it.
bool skip(const Parameter& p, const StepSettings& s, float sum) {
  if (s.propagate || is_finite(sum)) return false;
  ++*p.skipped;
  return true;
}

// Scale of the momentum under the cautious mask: a sweep of its own, because m_t depends on kappa.
float cautious_factor(const Parameter& p, const StepConstants& c, const Factors& factors,
                      int64_t workers) {
  std::atomic<int64_t> agreeing{0};
  for_each_task(Blocks(p).tasks(), workers,
                [&](int64_t task, int64_t) { agreeing += count_agreeing(p, c, factors, task); });
  return cautious_scale(static_cast<float>(agreeing.load()), static_cast<float>(p.numel()));
}

void apply_all(const Parameter& p, const StepConstants& c, const Factors& factors,
               int64_t workers) {
  for_each_task(Blocks(p).tasks(), workers,
                [&](int64_t task, int64_t) { apply_blocks(p, c, factors, task); });
}

// --- factored ---------------------------------------------------------------------------------

// Sweep A, then r, c, the factors of u, and the RMS that u is expected to have before scaling.
// Returns false if the gradient is not finite.
bool second_moment(const Parameter& p, const StepSettings& s, const CpuGrid& grid, Workspace& w,
                   int64_t workers, float* predicted_rms) {
  const Kernels& table = kernels();
  for_each_task(grid.tasks(), workers,
                [&](int64_t task, int64_t) { second_moment_task(p, grid, w, task); });
  add_parts(grid, w, 1);
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  const float total_g2 = table.lane_sum(w.row_sum[0], rows);
  give_out(p, total_g2);
  if (skip(p, s, total_g2)) return false;

  table.second_moment_ema(w.row_new, p.sq_row, w.row_sum[0], rows, static_cast<float>(p.k), s.beta2,
                          s.one_minus_beta2, s.eps1);
  table.second_moment_ema(w.col_new, p.sq_col, w.col_sum[0], cols, static_cast<float>(p.n), s.beta2,
                          s.one_minus_beta2, s.eps1);
  const float correction2 = s.correction(1, *p.step + 1);
  table.col_factors(w.col_factor, w.col_new, cols, correction2);
  // One value per matrix; the parts of sum 1 are free until sweep B and hold at least b values.
  float* predicted = w.row_part[1];
  for (int64_t i = 0; i < p.b; ++i) {
    const float* r = w.row_new + i * p.n;
    float* factor = w.row_factor + i * p.n;
    const float mean = table.lane_sum(r, p.n) / static_cast<float>(p.n);
    table.row_factors(factor, r, p.n, sqrt(mean), s.sign());
    const float* sum = w.row_sum[0] + i * p.n;
    const float row_ratio = table.lane_sum_of_ratios(sum, r, p.n);
    const float col_ratio =
        table.lane_sum_of_ratios(w.col_sum[0] + i * p.k, w.col_new + i * p.k, p.k);
    predicted[i] =
        predicted_square(row_ratio, col_ratio, mean, correction2, table.lane_sum(sum, p.n));
  }
  *predicted_rms = root_mean(table.lane_sum(predicted, p.b), static_cast<float>(p.numel()));
  return true;
}

// Sweep B, then kappa, R, C; commits r, c. Returns false if u is not finite.
bool instability(const Parameter& p, const StepSettings& s, const CpuGrid& grid, Workspace& w,
                 int64_t workers, float predicted_rms, float* kappa) {
  const Kernels& table = kernels();
  const float kappa_0 = clip_scale(*p.rms_ratio * predicted_rms, s.clip_threshold);
  // What sweep A read last is still in the caches.
  for_each_task(grid.tasks(), workers, Order::kBackwards,
                [&](int64_t task, int64_t) { instability_task(p, grid, w, kappa_0, task); });
  add_parts(grid, w, 3);
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  const float total_u2 = table.lane_sum(w.row_sum[2], rows);
  if (skip(p, s, total_u2)) return false;

  const float rms = root_mean(total_u2, static_cast<float>(p.numel()));
  *kappa = clip_scale(rms, s.clip_threshold);
  const float delta = *kappa - kappa_0;
  table.instability_ema(p.res_row, w.row_sum[0], w.row_sum[1], w.row_sum[2], rows, delta,
                        static_cast<float>(p.k), s.beta1_squared, s.eps2, s.beta3,
                        s.one_minus_beta3);
  table.instability_ema(p.res_col, w.col_sum[0], w.col_sum[1], w.col_sum[2], cols, delta,
                        static_cast<float>(p.n), s.beta1_squared, s.eps2, s.beta3,
                        s.one_minus_beta3);
  std::copy(w.row_new, w.row_new + rows, p.sq_row);
  std::copy(w.col_new, w.col_new + cols, p.sq_col);
  *p.rms_ratio = next_rms_ratio(rms, predicted_rms);
  return true;
}

void step_factored(const Parameter& p, const StepSettings& s, Workspace& w, int64_t workers) {
  const CpuGrid grid(p);
  w.lay_out(grid);
  float predicted_rms, kappa;
  if (!second_moment(p, s, grid, w, workers, &predicted_rms)) return;
  if (!instability(p, s, grid, w, workers, predicted_rms, &kappa)) return;
  ++*p.step;

  const Kernels& table = kernels();
  const StepConstants c = constants_of(p, s, *p.step, kappa);
  table.scale(w.row_factor, p.b * p.n, c.gain);
  Factors factors = {w.row_factor, w.col_factor, nullptr, nullptr};
  float scale = c.scale;
  if (s.cautious) scale = scale * cautious_factor(p, c, factors, workers);
  for (int64_t i = 0; i < p.b; ++i) {
    const float* r = p.res_row + i * p.n;
    const float mean = table.lane_sum(r, p.n) / static_cast<float>(p.n);
    table.row_factors(w.row_new + i * p.n, r, p.n, sqrt(mean), scale);
  }
  table.col_factors(w.col_new, p.res_col, p.b * p.k, s.correction(2, *p.step));
  factors.update_row = w.row_new;
  factors.update_col = w.col_new;
  apply_all(p, c, factors, workers);
}

// --- unfactored -------------------------------------------------------------------------------

int64_t chunks_of(const Parameter& p) {
  return (p.numel() + kChunk - 1) / kChunk;
}

// Lane sum over the whole parameter of what `sum(first, size, gradient)` gives for each chunk.
template <class Sum>
float sum_chunks(const Parameter& p, float* parts, int64_t workers, const Sum& sum) {
  const int64_t chunks = chunks_of(p);
  const int64_t tasks = (chunks + kChunksPerTask - 1) / kChunksPerTask;
  for_each_task(tasks, workers, [&](int64_t task, int64_t) {
    alignas(64) float buffer[kChunk];
    const int64_t end = std::min(chunks, (task + 1) * kChunksPerTask);
    for (int64_t i = task * kChunksPerTask; i < end; ++i) {
      const int64_t first = i * kChunk;
      const int size = static_cast<int>(std::min<int64_t>(kChunk, p.numel() - first));
      parts[i] = sum(first, size, p.grad.read(first, size, buffer));
    }
  });
  float total = 0.0f;
  for (int64_t i = 0; i < chunks; ++i) total = total + parts[i];
  return total;
}

void step_unfactored(const Parameter& p, const StepSettings& s, Workspace& w, int64_t workers) {
  const Kernels& table = kernels();
  const Dtype dtype = p.grad_dtype;
  const float total_g2 = sum_chunks(p, w.scratch(), workers, [&](int64_t, int size, const void* g) {
    return table.sum_g2[dtype](g, size);
  });
  give_out(p, total_g2);
  if (skip(p, s, total_g2)) return;
  StepConstants c = constants_of(p, s, *p.step + 1, 1.0f);
  const float total_u2 =
      sum_chunks(p, w.scratch(), workers, [&](int64_t first, int size, const void* g) {
        return table.sum_u2[dtype](c, g, p.exp_avg_sq + first, size);
      });
  if (skip(p, s, total_u2)) return;
  ++*p.step;
  const float rms = root_mean(total_u2, static_cast<float>(p.numel()));
  c.gain = gain(clip_scale(rms, s.clip_threshold), s.one_minus_beta1);
  const Factors none = {};
  if (s.cautious) c.scale = c.scale * cautious_factor(p, c, none, workers);
  apply_all(p, c, none, workers);
}

// --- lists ------------------------------------------------------------------------------------

// Runs step(parameter, workspace, workers): large parameters one after another with all threads,
// so that a gradient is still cached for the next sweep; then small ones, a thread each.
template <class Floats, class Step>
void step_list(const std::vector<Parameter>& parameters, const Floats& floats, const Step& step) {
  std::vector<const Parameter*> small;
  const int64_t workers = thread_count();
  std::vector<Workspace> workspaces(workers);
  for (const Parameter& p : parameters) {
    if (p.numel() == 0) continue;
    if (p.numel() <= kSerialElements) {
      small.push_back(&p);
      for (Workspace& w : workspaces) w.reserve(floats(p));
    }
  }
  for (const Parameter& p : parameters) {
    if (p.numel() <= kSerialElements) continue;
    workspaces[0].reserve(floats(p));
    step(p, workspaces[0], workers);
  }
  for_each_task(static_cast<int64_t>(small.size()), workers, [&](int64_t task, int64_t worker) {
    step(*small[task], workspaces[worker], int64_t{1});
  });
}

}  // namespace

void factored_step(const std::vector<Parameter>& parameters, const StepSettings& settings) {
  step_list(
      parameters, [](const Parameter& p) { return Workspace::floats(CpuGrid(p)); },
      [&](const Parameter& p, Workspace& w, int64_t workers) {
        step_factored(p, settings, w, workers);
      });
}

void unfactored_step(const std::vector<Parameter>& parameters, const StepSettings& settings) {
  step_list(
      parameters, [](const Parameter& p) { return chunks_of(p); },
      [&](const Parameter& p, Workspace& w, int64_t workers) {
        step_unfactored(p, settings, w, workers);
      });
}

}  // namespace came8bit
