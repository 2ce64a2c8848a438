// Registers the kernels for CPU tensors; the schemas are in came8bit/ops/schema.py. Everything is
// checked here, before the first thread starts and the first byte changes.
#include <torch/csrc/stable/library.h>

#include "../op_arguments.h"
#include "parallel.h"
#include "step.h"

namespace came8bit {
namespace {

StridedRuns strided(const Tensor& t, const char* what, size_t i) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, what, " ", i, ": got ", sizes.size(),
                  " dimensions, expected at most ", kMaxDims);
  return StridedRuns(t.data_ptr(), static_cast<int>(t.element_size()),
                     static_cast<int>(sizes.size()), sizes.data(), t.strides().data());
}

std::vector<Parameter> parameters_of(const std::vector<ParamArguments>& all, const Tensors& params,
                                     const Tensors& grads) {
  std::vector<Parameter> parameters;
  parameters.reserve(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    parameters.push_back(
        {all[i], strided(params[i], "parameter", i), strided(grads[i], "gradient", i)});
  }
  return parameters;
}

struct Cpu {
  using Environment = FloatEnvironment;

  static Device device() {
    return {"CPU", [](const Tensor& t) { return t.is_cpu(); }};
  }

  static void factored(const std::vector<ParamArguments>& all, const Tensors& params,
                       const Tensors& grads, const StepSettings& settings) {
    factored_step(parameters_of(all, params, grads), settings);
  }

  static void unfactored(const std::vector<ParamArguments>& all, const Tensors& params,
                         const Tensors& grads, const StepSettings& settings) {
    unfactored_step(flattened(parameters_of(all, params, grads)), settings);
  }

  static void factored_pass(Pass pass, const std::vector<ParamArguments>& all,
                            const std::vector<SharedArguments>& shared, const Tensors& params,
                            const Tensors& grads, const StepSettings& settings) {
    came8bit::factored_pass(pass, with(parameters_of(all, params, grads), shared), settings);
  }

  static void unfactored_pass(Pass pass, const std::vector<ParamArguments>& all,
                              const std::vector<SharedArguments>& shared, const Tensors& params,
                              const Tensors& grads, const StepSettings& settings) {
    came8bit::unfactored_pass(pass, with(flattened(parameters_of(all, params, grads)), shared),
                              settings);
  }

 private:
  static std::vector<Parameter> flattened(std::vector<Parameter> parameters) {
    for (Parameter& p : parameters) {
      p.k = p.numel();  // rows do not matter here
      p.b = p.n = 1;
    }
    return parameters;
  }

  static std::vector<Shared> with(const std::vector<Parameter>& parameters,
                                  const std::vector<SharedArguments>& shared) {
    std::vector<Shared> both;
    for (size_t i = 0; i < shared.size(); ++i) both.push_back({parameters[i], shared[i]});
    return both;
  }
};

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x) {
  const QuantizeArguments a = quantize_arguments(x);
  quantize(static_cast<const float*>(a.values.data_ptr()), a.slices, a.slice_len,
           static_cast<int8_t*>(a.codes.data_ptr()), static_cast<float*>(a.absmax.data_ptr()));
  return {a.codes, a.absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax) {
  const QuantizeArguments a = dequantize_arguments(codes, absmax);
  dequantize(static_cast<const int8_t*>(a.codes.data_ptr()),
             static_cast<const float*>(a.absmax.data_ptr()), a.slices, a.slice_len,
             static_cast<float*>(a.values.data_ptr()));
  return a.values;
}

}  // namespace
}  // namespace came8bit

STABLE_TORCH_LIBRARY_IMPL(came8bit, CPU, m) {
  m.impl("factored_step_", TORCH_BOX(&came8bit::factored_step_<came8bit::Cpu>));
  m.impl("unfactored_step_", TORCH_BOX(&came8bit::unfactored_step_<came8bit::Cpu>));
  came8bit::register_passes<came8bit::Cpu>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&came8bit::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&came8bit::dequantize_blockwise));
}
