// Steps of parameters with a full second moment.
#include "step_common.h"

namespace came8bit {
namespace {

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

float sum_g2(const Parameter& p, Workspace& w, int64_t workers) {
  return sum_chunks(p, w.scratch(), workers, [&](int64_t, int size, const void* g) {
    return kernels().sum_g2[p.grad_dtype](g, size);
  });
}

float sum_u2(const Parameter& p, const StepSettings& s, Workspace& w, int64_t workers) {
  const StepConstants c = constants_of(p, s, *p.step + 1, 1.0f);
  return sum_chunks(p, w.scratch(), workers, [&](int64_t first, int size, const void* g) {
    return kernels().sum_u2[p.grad_dtype](c, g, p.exp_avg_sq + first, size);
  });
}

// Counts the step; returns kappa.
float clip(const Parameter& p, const StepSettings& s, float total_u2, int64_t numel) {
  ++*p.step;
  return clip_scale(root_mean(total_u2, static_cast<float>(numel)), s.clip_threshold);
}

void step_unfactored(const Parameter& p, const StepSettings& s, Workspace& w, int64_t workers) {
  const float total_g2 = sum_g2(p, w, workers);
  give_out(p, total_g2);
  if (skip(p, s, total_g2)) return;
  const float total_u2 = sum_u2(p, s, w, workers);
  if (skip(p, s, total_u2)) return;
  const float kappa = clip(p, s, total_u2, p.numel());
  StepConstants c = constants_of(p, s, *p.step, kappa);
  if (s.cautious) {
    const int64_t agreeing = agreeing_elements(p, c, {}, workers);
    c.scale = c.scale * cautious_scale(static_cast<float>(agreeing), static_cast<float>(p.numel()));
  }
  apply_all(p, c, {}, workers);
}

void pass_unfactored(Pass pass, const Shared& p, const StepSettings& s, Workspace& w,
                     int64_t workers) {
  if (pass == Pass::kSecondMoment) {
    p.sums[0] = sum_g2(p, w, workers);
    return;
  }
  if (pass == Pass::kInstability) {
    if (!leave(p, s, static_cast<float>(p.reduced[0]))) p.sums[0] = sum_u2(p, s, w, workers);
    return;
  }
  if (is_left(p)) return;
  if (pass == Pass::kConfidence) {
    const float total = static_cast<float>(p.reduced[0]);
    if (leave(p, s, total)) return;
    p.work[kKappa] = clip(p, s, total, p.full_numel);
    const StepConstants c = constants_of(p, s, *p.step, p.work[kKappa]);
    if (s.cautious) p.sums[0] = static_cast<double>(agreeing_elements(p, c, {}, workers));
    return;
  }
  if (p.numel() == 0) return;
  StepConstants c = constants_of(p, s, *p.step, p.work[kKappa]);
  if (s.cautious) {
    c.scale = c.scale *
              cautious_scale(static_cast<float>(p.reduced[0]), static_cast<float>(p.full_numel));
  }
  apply_all(p, c, {}, workers);
}

}  // namespace

void unfactored_step(const std::vector<Parameter>& parameters, const StepSettings& settings) {
  step_list(
      parameters, [](const Parameter& p) { return chunks_of(p); },
      [&](const Parameter& p, Workspace& w, int64_t workers) {
        if (p.numel() != 0) step_unfactored(p, settings, w, workers);
      });
}

void unfactored_pass(Pass pass, const std::vector<Shared>& parameters,
                     const StepSettings& settings) {
  step_list(
      parameters, [](const Shared& p) { return chunks_of(p); },
      [&](const Shared& p, Workspace& w, int64_t workers) {
        pass_unfactored(pass, p, settings, w, workers);
      });
}

}  // namespace came8bit
