// One CAME step of a list of parameters, given as plain pointers.
#pragma once

#include <vector>

#include "../param_arguments.h"
#include "../step_settings.h"
#include "strided.h"

namespace came8bit {

struct Parameter : ParamArguments {
  StridedRuns param, grad;
};

void factored_step(const std::vector<Parameter>& parameters, const StepSettings& settings);
void unfactored_step(const std::vector<Parameter>& parameters, const StepSettings& settings);

// Codec of contiguous memory: slices x slice_len values.
void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax);
void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x);

}  // namespace came8bit
