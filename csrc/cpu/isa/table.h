// The table of the instruction set.
#pragma once

#include "coarse.h"
#include "instability.h"

namespace came8bit {

#define CAME8BIT_ROW(f, P, is8bit, factored) \
  {f<P, float, is8bit, factored>, f<P, Bf16, is8bit, factored>, f<P, Half, is8bit, factored>}
#define CAME8BIT_TABLE(f, is8bit, factored)                                           \
  {CAME8BIT_ROW(f, float, is8bit, factored), CAME8BIT_ROW(f, Bf16, is8bit, factored), \
   CAME8BIT_ROW(f, Half, is8bit, factored)}
#define CAME8BIT_COARSE_ROW(P, factored)                              \
  {coarse_apply<P, float, factored>, coarse_apply<P, Bf16, factored>, \
   coarse_apply<P, Half, factored>}
#define CAME8BIT_COARSE(factored)                                             \
  {CAME8BIT_COARSE_ROW(float, factored), CAME8BIT_COARSE_ROW(Bf16, factored), \
   CAME8BIT_COARSE_ROW(Half, factored)}
#define CAME8BIT_AGREEING(is8bit, factored)                             \
  {agreeing<float, is8bit, factored>, agreeing<Bf16, is8bit, factored>, \
   agreeing<Half, is8bit, factored>}

// Defines the table of this instruction set as `kernels_<isa>`.
#define CAME8BIT_DEFINE_KERNELS(name)                                                             \
  const Kernels name = [] {                                                                       \
    using namespace CAME8BIT_ISA;                                                                 \
    return Kernels{                                                                               \
        {second_moment<float>, second_moment<Bf16>, second_moment<Half>},                         \
        {instability<float, int8_t>, instability<Bf16, int8_t>, instability<Half, int8_t>},       \
        {instability<float, float>, instability<Bf16, float>, instability<Half, float>},          \
        CAME8BIT_TABLE(apply, true, true),                                                        \
        CAME8BIT_TABLE(apply, false, true),                                                       \
        CAME8BIT_TABLE(apply, true, false),                                                       \
        CAME8BIT_TABLE(apply, false, false),                                                      \
        {steps<float>, steps<Bf16>, steps<Half>},                                                 \
        CAME8BIT_AGREEING(true, true),                                                            \
        CAME8BIT_AGREEING(false, true),                                                           \
        CAME8BIT_AGREEING(true, false),                                                           \
        CAME8BIT_AGREEING(false, false),                                                          \
        {coarse_momentum<float, true>, coarse_momentum<Bf16, true>, coarse_momentum<Half, true>}, \
        {coarse_momentum<float, false>, coarse_momentum<Bf16, false>,                             \
         coarse_momentum<Half, false>},                                                           \
        CAME8BIT_COARSE(true),                                                                    \
        CAME8BIT_COARSE(false),                                                                   \
        coarse_agreeing,                                                                          \
        {encode4, decode4},                                                                       \
        {encode2, decode2},                                                                       \
        {sum_g2<float>, sum_g2<Bf16>, sum_g2<Half>},                                              \
        {sum_u2<float>, sum_u2<Bf16>, sum_u2<Half>},                                              \
        random_bits,                                                                              \
        largest_magnitude,                                                                        \
        CAME8BIT_ISA::encode,                                                                     \
        CAME8BIT_ISA::decode,                                                                     \
        lane_sum,                                                                                 \
        lane_sum_of_ratios,                                                                       \
        add,                                                                                      \
        scale,                                                                                    \
        second_moment_ema,                                                                        \
        row_factors,                                                                              \
        col_factors,                                                                              \
        instability_ema,                                                                          \
    };                                                                                            \
  }()

}  // namespace came8bit
