// Chooses the instruction set once, by what the processor has; tests may choose another.
#include <atomic>

#include "kernel_table.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace came8bit {
namespace {

enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__) && defined(__GNUC__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(_MSC_VER) && defined(_M_X64)
// Whether the operating system saves the registers in `mask` (XCR0), and leaf 7 EBX has `bits`.
bool has_leaf7(unsigned mask, unsigned bits) {
  int leaf[4];
  __cpuid(leaf, 1);
  const unsigned needed = (1u << 27) | (1u << 28) | (1u << 29);  // OSXSAVE, AVX, F16C
  if ((static_cast<unsigned>(leaf[2]) & needed) != needed) return false;
  if ((_xgetbv(0) & mask) != mask) return false;
  __cpuidex(leaf, 7, 0);
  return (static_cast<unsigned>(leaf[1]) & bits) == bits;
}
[[maybe_unused]] bool has_avx2() {
  return has_leaf7(0x6, 1u << 5);
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && has_leaf7(0xe6, (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31));
}
#else
[[maybe_unused]] bool has_avx2() {
  return false;
}
[[maybe_unused]] bool has_avx512() {
  return false;
}
#endif

const Kernels* table_of(int isa) {
  if (isa == kBaseline) return &kernels_baseline;
#ifdef CAME8BIT_HAVE_AVX2
  if (isa == kAvx2 && has_avx2()) return &kernels_avx2;
#endif
#ifdef CAME8BIT_HAVE_AVX512
  if (isa == kAvx512 && has_avx512()) return &kernels_avx512;
#endif
  return nullptr;
}

int best_isa() {
  int isa = kAvx512;
  while (table_of(isa) == nullptr) --isa;
  return isa;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{best_isa()};
  return isa;
}

}  // namespace

const Kernels& kernels() {
  return *table_of(chosen().load(std::memory_order_relaxed));
}

}  // namespace came8bit

#if defined(_WIN32)
#define CAME8BIT_EXPORT extern "C" __declspec(dllexport)
#else
#define CAME8BIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// For came8bit/ops/libraries.py: 0 baseline, 1 avx2, 2 avx512.
CAME8BIT_EXPORT int came8bit_cpu_best_isa(void) {
  return came8bit::best_isa();
}
CAME8BIT_EXPORT int came8bit_cpu_isa(void) {
  return came8bit::chosen().load();
}
// Returns -1 where this processor or build does not have it.
CAME8BIT_EXPORT int came8bit_cpu_set_isa(int isa) {
  if (isa < 0 || isa > 2 || came8bit::table_of(isa) == nullptr) return -1;
  came8bit::chosen().store(isa);
  return 0;
}
