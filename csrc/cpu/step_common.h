// What the steps of both kinds of parameter share: step.cpp and unfactored.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "blocks.h"
#include "parallel.h"
#include "tiles.h"

namespace came8bit {
namespace {

// Parameters are stepped by one thread each up to the first of these sizes, and up to the second
// where a call has enough of them to keep all threads busy: to share one costs as much as stepping
// some ten thousand elements. Larger ones are stepped by all threads together.
constexpr int64_t kAlwaysAlone = 1 << 16, kMostAlone = 1 << 20;
constexpr int64_t kTurns = 8;  // enough of them: so many for each thread, if all were as large
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

// How many elements the cautious mask keeps: a sweep of its own, because m_t depends on kappa.
int64_t agreeing_elements(const Parameter& p, const StepConstants& c, const Factors& factors,
                          int64_t workers) {
  std::atomic<int64_t> agreeing{0};
  for_each_task(Blocks(p).tasks(), workers,
                [&](int64_t task, int64_t) { agreeing += count_agreeing(p, c, factors, task); });
  return agreeing.load();
}

void apply_all(const Parameter& p, const StepConstants& c, const Factors& factors,
               int64_t workers) {
  for_each_task(Blocks(p).tasks(), workers,
                [&](int64_t task, int64_t) { apply_blocks(p, c, factors, task); });
}

// Whether an earlier pass has left the parameter out of the step.
bool is_left(const Shared& p) {
  const bool left = p.work[kLeft] != 0.0f;
  if (left && p.sums != nullptr) std::fill(p.sums, p.sums + p.sums_size, 0.0);
  return left;
}

// Whether the parameter is left out of the step because a sum is not finite; notes it.
bool leave(const Shared& p, const StepSettings& s, float sum) {
  p.work[kLeft] = skip(p, s, sum) ? 1.0f : 0.0f;
  return is_left(p);
}

// --- lists ------------------------------------------------------------------------------------

// Runs step(parameter, workspace, workers): large parameters one after another with all threads,
// so that a gradient is still cached for the next sweep; then the others, a thread each, the
// largest first.
template <class P, class Floats, class Step>
void step_list(const std::vector<P>& parameters, const Floats& floats, const Step& step) {
  const int64_t workers = thread_count();
  int64_t elements = 0;
  for (const P& p : parameters) elements += p.numel() <= kMostAlone ? p.numel() : 0;
  const int64_t most = std::clamp<int64_t>(elements / (workers * kTurns), kAlwaysAlone, kMostAlone);
  std::vector<Workspace> workspaces(workers);
  std::vector<const P*> alone;
  for (const P& p : parameters) {
    if (p.numel() <= most) {
      alone.push_back(&p);
      for (Workspace& w : workspaces) w.reserve(floats(p));
      continue;
    }
    workspaces[0].reserve(floats(p));
    step(p, workspaces[0], workers);
  }
  std::stable_sort(alone.begin(), alone.end(),
                   [](const P* a, const P* b) { return a->numel() > b->numel(); });
  std::atomic<int64_t> next{0};
  const int64_t count = static_cast<int64_t>(alone.size());
  for_each_task(std::min(workers, count), workers, [&](int64_t, int64_t worker) {
    for (int64_t i = next++; i < count; i = next++) {
      step(*alone[i], workspaces[worker], int64_t{1});
    }
  });
}

}  // namespace
}  // namespace came8bit
