// Tasks on PyTorch's intra-op threads. Which thread runs a task never changes its result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define CAME8BIT_HAS_MXCSR
#endif

namespace came8bit {

// Round to nearest, keep subnormals, whatever this thread was set to: a library built with
// -ffast-math or torch.set_flush_denormal(True) must not change our bits.
class FloatEnvironment {
 public:
#ifdef CAME8BIT_HAS_MXCSR
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatEnvironment() {}
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
};

inline int64_t thread_count() {
  return torch::stable::get_num_threads();
}

// Calls run(task, worker) for every task in [0, tasks), on up to `workers` threads. `run` must not
// throw: an exception would lose its text.
template <class Run>
void for_each_task(int64_t tasks, int64_t workers, const Run& run) {
  if (tasks < workers) workers = tasks;
  if (workers <= 1) {
    const FloatEnvironment environment;
    for (int64_t task = 0; task < tasks; ++task) run(task, int64_t{0});
    return;
  }
  std::atomic<int64_t> next_task{0}, next_worker{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t worker = next_worker.fetch_add(1);
      for (int64_t task = next_task.fetch_add(1); task < tasks; task = next_task.fetch_add(1)) {
        run(task, worker);
      }
    }
  });
}

}  // namespace came8bit
