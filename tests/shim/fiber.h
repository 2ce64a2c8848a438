// Threads of a block as fibers: stacks, and the switch between them, announced to the sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_shim.h"

#if !defined(__x86_64__) && !defined(CAME8BIT_SHIM_UCONTEXT)
#define CAME8BIT_SHIM_UCONTEXT
#endif
#if defined(CAME8BIT_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

// Present where the process runs under that sanitizer, null otherwise.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber(void);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
}

namespace came8bit_shim {

inline bool under_tsan() {
  return __tsan_create_fiber != nullptr;
}
inline void acquire(void* address) {
  if (under_tsan()) __tsan_acquire(address);
}
inline void release(void* address) {
  if (under_tsan()) __tsan_release(address);
}

// A place where execution can stand: a fiber, or the OS thread that runs the fibers.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  // Begins at `entry` when it is switched to next. `entry` does not return.
  void prepare(void (*entry)());

  // Stands for the OS thread that calls this.
  void adopt_thread() {
    if (under_tsan()) tsan_ = __tsan_get_current_fiber();
  }

  // From here, where this context stands, to another. No synchronisation: barriers do that.
  void switch_to(Context& to);

  // First thing at an entry, and after each switch.
  void arrived();

 private:
  char* memory_ = nullptr;
  const char* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
  bool owns_tsan_ = false;
#if defined(CAME8BIT_SHIM_UCONTEXT)
  ucontext_t state_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace came8bit_shim
