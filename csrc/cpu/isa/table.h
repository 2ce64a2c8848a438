// The table of the instruction set.
#pragma once

#include "apply.h"
#include "coarse.h"
#include "instability.h"

namespace came8bit {

#define CAME8BIT_OF_DTYPES(f) {f<float>, f<Bf16>, f<Half>}
#define CAME8BIT_MOMENTUM(MT, coded, factored)                                \
  {momentum<float, MT, coded, factored>, momentum<Bf16, MT, coded, factored>, \
   momentum<Half, MT, coded, factored>}
#define CAME8BIT_APPLY(factored) \
  {apply<float, factored>, apply<Bf16, factored>, apply<Half, factored>}

// Defines the table of this instruction set as `kernels_<isa>`.
#define CAME8BIT_DEFINE_KERNELS(name)                                                       \
  const Kernels name = [] {                                                                 \
    using namespace CAME8BIT_ISA;                                                           \
    return Kernels{                                                                         \
        CAME8BIT_OF_DTYPES(second_moment),                                                  \
        {instability<float, int8_t>, instability<Bf16, int8_t>, instability<Half, int8_t>}, \
        {instability<float, Packed<4>>, instability<Bf16, Packed<4>>,                       \
         instability<Half, Packed<4>>},                                                     \
        {instability<float, Packed<2>>, instability<Bf16, Packed<2>>,                       \
         instability<Half, Packed<2>>},                                                     \
        {instability<float, float>, instability<Bf16, float>, instability<Half, float>},    \
        CAME8BIT_MOMENTUM(int8_t, true, true),                                              \
        CAME8BIT_MOMENTUM(Packed<4>, true, true),                                           \
        CAME8BIT_MOMENTUM(Packed<2>, true, true),                                           \
        CAME8BIT_MOMENTUM(float, true, true),                                               \
        CAME8BIT_MOMENTUM(float, false, true),                                              \
        CAME8BIT_MOMENTUM(int8_t, true, false),                                             \
        CAME8BIT_MOMENTUM(float, true, false),                                              \
        CAME8BIT_MOMENTUM(float, false, false),                                             \
        kManyRegisters ? momentum_and_update<int8_t, true> : nullptr,                       \
        kManyRegisters ? momentum_and_update<float, false> : nullptr,                       \
        CAME8BIT_APPLY(true),                                                               \
        CAME8BIT_APPLY(false),                                                              \
        CAME8BIT_OF_DTYPES(steps),                                                          \
        CAME8BIT_OF_DTYPES(forget),                                                         \
        agreeing,                                                                           \
        {encode4, encode4_rows, decode4},                                                   \
        {encode2, encode2_rows, decode2},                                                   \
        {encode0, encode0_rows, decode0},                                                   \
        CAME8BIT_OF_DTYPES(sum_g2),                                                         \
        CAME8BIT_OF_DTYPES(sum_u2),                                                         \
        random_bits,                                                                        \
        largest_magnitude,                                                                  \
        CAME8BIT_ISA::encode,                                                               \
        CAME8BIT_ISA::decode,                                                               \
        encode_rows,                                                                        \
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
