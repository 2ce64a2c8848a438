#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace came8bit_shim {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync

// Who switched last, on this OS thread.
Context* came_from(Context* next) {
  Context* const previous = static_cast<Context*>(thread_state.last_context);
  if (next != nullptr) thread_state.last_context = next;
  return previous;
}

}  // namespace

#if !defined(CAME8BIT_SHIM_UCONTEXT)
// Saves what a call must preserve, stores the stack pointer in *from and continues at `to`.
extern "C" void came8bit_shim_switch(void** from, void* to);
asm(R"(
.text
.type came8bit_shim_switch, @function
.hidden came8bit_shim_switch
.globl came8bit_shim_switch
came8bit_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size came8bit_shim_switch, .-came8bit_shim_switch
)");
#endif

Context::~Context() {
  if (memory_ != nullptr) munmap(memory_, kGuard + kStack);
  if (owns_tsan_) __tsan_destroy_fiber(tsan_);
}

void Context::prepare(void (*entry)()) {
  if (memory_ == nullptr) {
    memory_ = static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_, kGuard, PROT_NONE) != 0) {
      perror("came8bit shim: stack of a fiber");
      abort();
    }
    bottom_ = memory_ + kGuard;
    size_ = kStack;
  }
  if (under_tsan() && tsan_ == nullptr) {
    tsan_ = __tsan_create_fiber(0);
    owns_tsan_ = true;
  }
  fake_stack_ = nullptr;
#if defined(CAME8BIT_SHIM_UCONTEXT)
  getcontext(&state_);
  state_.uc_stack.ss_sp = memory_ + kGuard;
  state_.uc_stack.ss_size = kStack;
  state_.uc_link = nullptr;
  makecontext(&state_, entry, 0);
#else
  void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack);
  *--top = nullptr;  // where a return address would be: keeps the alignment of a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void Context::switch_to(Context& to) {
  if (under_tsan()) __tsan_switch_to_fiber(to.tsan_, kNoSync);
  if (__sanitizer_start_switch_fiber != nullptr && !under_tsan()) {
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
  }
  came_from(this);
#if defined(CAME8BIT_SHIM_UCONTEXT)
  swapcontext(&state_, &to.state_);
#else
  came8bit_shim_switch(&stack_pointer_, to.stack_pointer_);
#endif
  arrived();
}

void Context::arrived() {
  if (__sanitizer_finish_switch_fiber != nullptr && !under_tsan()) {
    Context* from = came_from(nullptr);
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (from != nullptr && from->memory_ == nullptr) {  // an OS thread: now its stack is known
      from->bottom_ = static_cast<const char*>(bottom);
      from->size_ = size;
    }
  }
}

}  // namespace came8bit_shim
