// Tasks on PyTorch's intra-op threads. Which thread runs a task never changes its result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>
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

enum class Order { kForwards, kBackwards };

// A worker's tasks, and how many of them have been started. On a cache line of its own.
struct alignas(64) Share {
  int64_t first, end;
  std::atomic<int64_t> begun{0};
};

// Calls run(task, worker) for every task in [0, tasks), on up to `workers` threads. Each has a
// share of neighbouring tasks, the same one in every sweep, so that it finds in its caches what it
// has left there; a worker that is done helps the next. `run` must not throw: an exception would
// lose its text.
template <class Run>
void for_each_task(int64_t tasks, int64_t workers, Order order, const Run& run) {
  const bool forwards = order == Order::kForwards;
  if (tasks < workers) workers = tasks;
  if (workers <= 1) {
    const FloatEnvironment environment;
    for (int64_t i = 0; i < tasks; ++i) run(forwards ? i : tasks - 1 - i, int64_t{0});
    return;
  }
  std::vector<Share> shares(static_cast<size_t>(workers));
  for (int64_t i = 0; i < workers; ++i) {
    shares[i].first = tasks * i / workers;
    shares[i].end = tasks * (i + 1) / workers;
  }
  std::atomic<int64_t> next_worker{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t own = begin; own < end; ++own) {
      const int64_t worker = next_worker.fetch_add(1);
      for (int64_t i = 0; i < workers; ++i) {
        Share& share = shares[(own + i) % workers];
        const int64_t size = share.end - share.first;
        for (int64_t done = share.begun.fetch_add(1); done < size;
             done = share.begun.fetch_add(1)) {
          run(forwards ? share.first + done : share.end - 1 - done, worker);
        }
      }
    }
  });
}
template <class Run>
void for_each_task(int64_t tasks, int64_t workers, const Run& run) {
  for_each_task(tasks, workers, Order::kForwards, run);
}

}  // namespace came8bit
