// Everything that is compiled once per instruction set. Define CAME8BIT_ISA before.
#pragma once

#include "../kernel_table.h"

#define CAME8BIT_ISA_baseline 1
#define CAME8BIT_ISA_avx2 2
#define CAME8BIT_ISA_avx512 3
#define CAME8BIT_JOIN_(a, b) a##b
#define CAME8BIT_JOIN(a, b) CAME8BIT_JOIN_(a, b)
#if CAME8BIT_JOIN(CAME8BIT_ISA_, CAME8BIT_ISA) == CAME8BIT_ISA_avx512
#include "lanes_avx512.h"
#elif CAME8BIT_JOIN(CAME8BIT_ISA_, CAME8BIT_ISA) == CAME8BIT_ISA_avx2
#include "lanes_avx2.h"
#include "parts.h"
#else
#include "lanes_baseline.h"
#include "parts.h"
#endif

// Lambdas of inner loops must be inlined: their references would otherwise live in memory.
#if defined(__GNUC__)
#define CAME8BIT_LAMBDA __attribute__((always_inline))
#else
#define CAME8BIT_LAMBDA
#endif

#if defined(__clang__)
#define CAME8BIT_ROLLED _Pragma("nounroll")
#elif defined(__GNUC__)
#define CAME8BIT_ROLLED _Pragma("GCC unroll 1")
#else
#define CAME8BIT_ROLLED
#endif

#include "table.h"
