// Registers the kernels for CPU tensors; the schemas are in came8bit/ops/schema.py. Everything is
// checked here, before the first thread starts and the first byte changes.
#include <torch/csrc/stable/library.h>

#include "../op_arguments.h"
#include "parallel.h"
#include "step.h"

namespace came8bit {
namespace {

const Checker kCheck({"CPU", [](const Tensor& t) { return t.is_cpu(); }});

StridedRuns strided(const Tensor& t, Dtype dtype, const char* what, size_t i) {
  STD_TORCH_CHECK(t.dim() <= kMaxDims, what, " ", i, ": got ", t.dim(),
                  " dimensions, expected at most ", kMaxDims);
  return StridedRuns(t.data_ptr(), dtype, static_cast<int>(t.dim()), t.sizes().data(),
                     t.strides().data());
}

std::vector<Parameter> parameters_of(const std::vector<Arguments>& all) {
  std::vector<Parameter> parameters;
  for (size_t i = 0; i < all.size(); ++i) {
    const Arguments& a = all[i];
    parameters.push_back({strided(*a.param, a.param_dtype, "parameter", i),
                          strided(*a.grad, a.grad_dtype, "gradient", i), a.b, a.n, a.k, a.index,
                          a.offset, a.slices, a.slice_len, a.exp_avg, a.absmax, a.sq_row, a.sq_col,
                          a.res_row, a.res_col, a.rms_ratio, a.exp_avg_sq, a.step, a.skipped});
  }
  return parameters;
}

Settings settings_of(const HyperArguments& h) {
  Settings s = {};
  s.beta1 = h.beta1;
  s.beta2 = h.beta2;
  s.beta3 = h.beta3;
  s.eps1 = static_cast<float>(h.eps1);
  s.eps2 = static_cast<float>(h.eps2);
  s.clip_threshold = static_cast<float>(h.clip_threshold);
  s.lr = h.lr_tensor ? *h.lr_tensor : static_cast<float>(h.lr);
  s.shrink = h.lr_tensor ? shrink_of(s.lr, static_cast<float>(h.weight_decay))
                         : shrink_of(h.lr, h.weight_decay);
  s.stochastic = h.stochastic;
  s.cautious = h.cautious;
  s.propagate = h.propagate;
  s.maximize = h.maximize;
  s.bias_correction = h.bias_correction;
  s.seed = h.seed;
  return s;
}

void factored_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors absmax,
                    Tensors exp_avg_sq_row, Tensors exp_avg_sq_col, Tensors exp_avg_res_row,
                    Tensors exp_avg_res_col, Tensors rms_ratio, Tensors step, Tensors skipped,
                    std::vector<int64_t> views, std::optional<Tensor> lr_tensor,
                    std::vector<double> hyper, std::vector<int64_t> options) {
  const FloatEnvironment environment;  // also for the scalars of a call
  std::vector<Arguments> all = kCheck.common(params, grads, exp_avg, absmax, step, skipped, views);
  kCheck.factored(all, exp_avg_sq_row, exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col, rms_ratio);
  const Settings settings = settings_of(kCheck.hyper(lr_tensor, hyper, options));
  factored_step(parameters_of(all), settings);
}

void unfactored_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors absmax,
                      Tensors exp_avg_sq, Tensors step, Tensors skipped, std::vector<int64_t> views,
                      std::optional<Tensor> lr_tensor, std::vector<double> hyper,
                      std::vector<int64_t> options) {
  const FloatEnvironment environment;  // also for the scalars of a call
  std::vector<Arguments> all = kCheck.common(params, grads, exp_avg, absmax, step, skipped, views);
  kCheck.unfactored(all, exp_avg_sq);
  const Settings settings = settings_of(kCheck.hyper(lr_tensor, hyper, options));
  std::vector<Parameter> parameters = parameters_of(all);
  for (Parameter& p : parameters) {
    p.k = p.numel();  // rows do not matter here
    p.b = p.n = 1;
  }
  unfactored_step(parameters, settings);
}

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
  m.impl("factored_step_", TORCH_BOX(&came8bit::factored_step_));
  m.impl("unfactored_step_", TORCH_BOX(&came8bit::unfactored_step_));
  m.impl("quantize_blockwise", TORCH_BOX(&came8bit::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&came8bit::dequantize_blockwise));
}
