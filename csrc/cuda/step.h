// One CAME step of a list of parameters on the device, queued on a stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../param_arguments.h"
#include "parameter.h"

namespace came8bit {

// A parameter as the operator got it; workspace pointers are filled in by the step.
struct HostParameter {
  Parameter parameter;
  Strides param_strides, grad_strides;  // dims == 0: contiguous
  int bits;                             // of the momentum
  SharedArguments shared;               // of a pass
};

// How the work is cut up. Results do not depend on it.
struct Tuning {
  int64_t group_bytes;     // of gradients and momentum that are swept together
  int64_t small_elements;  // parameters up to this size are done by one block each
  int apply_rounds;        // rows a thread handles in a tile of sweep C; 0: as many as fit
};

// From the device, or CAME8BIT_CUDA_GROUP_BYTES, _SMALL_ELEMENTS and _APPLY_ROUNDS.
Tuning tuning_of(const torch::stable::Tensor& any);

// `any` is a tensor on the device, from which the workspace is made.
void factored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                   const torch::stable::Tensor& any);
void unfactored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                     const torch::stable::Tensor& any);

// One pass of it, over parameters of which other ranks may have rows.
void factored_pass(Pass pass, std::vector<HostParameter>& parameters, const StepSettings& settings,
                   const torch::stable::Tensor& any);
void unfactored_pass(Pass pass, std::vector<HostParameter>& parameters,
                     const StepSettings& settings, const torch::stable::Tensor& any);

// Codec of contiguous memory: slices x slice_len values.
void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax,
              cudaStream_t stream);
void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x, cudaStream_t stream);

}  // namespace came8bit
