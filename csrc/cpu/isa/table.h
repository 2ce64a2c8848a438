// The table of the instruction set.
#pragma once

#include "apply4.h"
#include "instability.h"

namespace came8bit {

#define CAME8BIT_ROW(f, P, is8bit, factored) \
  {f<P, float, is8bit, factored>, f<P, Bf16, is8bit, factored>, f<P, Half, is8bit, factored>}
#define CAME8BIT_TABLE(f, is8bit, factored)                                           \
  {CAME8BIT_ROW(f, float, is8bit, factored), CAME8BIT_ROW(f, Bf16, is8bit, factored), \
   CAME8BIT_ROW(f, Half, is8bit, factored)}
#define CAME8BIT_ROW4(P, factored) \
  {apply4<P, float, factored>, apply4<P, Bf16, factored>, apply4<P, Half, factored>}
#define CAME8BIT_TABLE4(factored) \
  {CAME8BIT_ROW4(float, factored), CAME8BIT_ROW4(Bf16, factored), CAME8BIT_ROW4(Half, factored)}
#define CAME8BIT_AGREEING(is8bit, factored)                             \
  {agreeing<float, is8bit, factored>, agreeing<Bf16, is8bit, factored>, \
   agreeing<Half, is8bit, factored>}

// Defines the table of this instruction set as `kernels_<isa>`.
#define CAME8BIT_DEFINE_KERNELS(name)                                                       \
  const Kernels name = [] {                                                                 \
    using namespace CAME8BIT_ISA;                                                           \
    return Kernels{                                                                         \
        {second_moment<float>, second_moment<Bf16>, second_moment<Half>},                   \
        {instability<float, int8_t>, instability<Bf16, int8_t>, instability<Half, int8_t>}, \
        {instability<float, float>, instability<Bf16, float>, instability<Half, float>},    \
        CAME8BIT_TABLE(apply, true, true),                                                  \
        CAME8BIT_TABLE(apply, false, true),                                                 \
        CAME8BIT_TABLE(apply, true, false),                                                 \
        CAME8BIT_TABLE(apply, false, false),                                                \
        {steps<float>, steps<Bf16>, steps<Half>},                                           \
        CAME8BIT_AGREEING(true, true),                                                      \
        CAME8BIT_AGREEING(false, true),                                                     \
        CAME8BIT_AGREEING(true, false),                                                     \
        CAME8BIT_AGREEING(false, false),                                                    \
        {momentum4<float, true>, momentum4<Bf16, true>, momentum4<Half, true>},             \
        {momentum4<float, false>, momentum4<Bf16, false>, momentum4<Half, false>},          \
        CAME8BIT_TABLE4(true),                                                              \
        CAME8BIT_TABLE4(false),                                                             \
        agreeing4,                                                                          \
        CAME8BIT_ISA::encode4,                                                              \
        CAME8BIT_ISA::decode4,                                                              \
        {sum_g2<float>, sum_g2<Bf16>, sum_g2<Half>},                                        \
        {sum_u2<float>, sum_u2<Bf16>, sum_u2<Half>},                                        \
        random_bits,                                                                        \
        largest_magnitude,                                                                  \
        CAME8BIT_ISA::encode,                                                               \
        CAME8BIT_ISA::decode,                                                               \
        lane_sum,                                                                           \
        lane_sum_of_ratios,                                                                 \
        add,                                                                                \
        scale,                                                                              \
        second_moment_ema,                                                                  \
        row_factors,                                                                        \
        col_factors,                                                                        \
        instability_ema,                                                                    \
    };                                                                                      \
  }()

}  // namespace came8bit
