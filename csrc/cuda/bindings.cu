// Registers the kernels for CUDA tensors; the schemas are in came8bit/ops/schema.py. Everything is
// checked here, before the first launch.
#include "../op_arguments.h"
#include "step.h"

namespace came8bit {
namespace {

const Checker kCheck({kDeviceName, is_device_tensor});

// Sizes and strides with neighbours that lie behind each other merged; dims == 0: contiguous.
Strides strides_of(const Tensor& t, const char* what, size_t i) {
  Strides s = {};
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (s.dims > 0 && s.strides[s.dims - 1] == size * stride) {
      s.sizes[s.dims - 1] *= size;
      s.strides[s.dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(s.dims < kMaxDims, what, " ", i, ": got more than ", kMaxDims,
                    " dimensions with strides of their own; use a contiguous tensor");
    s.sizes[s.dims] = size;
    s.strides[s.dims] = stride;
    ++s.dims;
  }
  if (s.dims == 1 && s.strides[0] == 1) s.dims = 0;
  return s;
}

std::vector<HostParameter> parameters_of(const std::vector<Arguments>& all) {
  std::vector<HostParameter> parameters(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Arguments& a = all[i];
    HostParameter& h = parameters[i];
    STD_TORCH_CHECK(a.param->get_device_index() == all[0].param->get_device_index() &&
                        a.grad->get_device_index() == all[0].param->get_device_index(),
                    "parameter ", i, ": expected all parameters and gradients on one device");
    h.param_strides = strides_of(*a.param, "parameter", i);
    h.grad_strides = strides_of(*a.grad, "gradient", i);
    h.is8bit = a.absmax != nullptr;
    Parameter& p = h.parameter;
    p = {};
    p.param = {a.param->data_ptr(), nullptr, a.param_dtype};
    p.grad = {a.grad->data_ptr(), nullptr, a.grad_dtype};
    p.exp_avg = a.exp_avg;
    p.absmax = a.absmax;
    p.sq_row = a.sq_row;
    p.sq_col = a.sq_col;
    p.res_row = a.res_row;
    p.res_col = a.res_col;
    p.rms_ratio = a.rms_ratio;
    p.exp_avg_sq = a.exp_avg_sq;
    p.step = a.step;
    p.skipped = a.skipped;
    p.b = a.b;
    p.n = a.n;
    p.k = a.k;
    p.slices = a.slices;
    p.slice_len = a.slice_len;
    p.blocks_per_slice = (a.slice_len + kBlockSize - 1) / kBlockSize;
    p.offset = a.offset;
    p.byte_pattern = kBytePattern;
    p.index = a.index;
  }
  return parameters;
}

Settings settings_of(const HyperArguments& h) {
  Settings s = {};
  s.betas[0] = h.beta1;
  s.betas[1] = h.beta2;
  s.betas[2] = h.beta3;
  s.beta1 = static_cast<float>(h.beta1);
  s.beta2 = static_cast<float>(h.beta2);
  s.beta3 = static_cast<float>(h.beta3);
  s.one_minus_beta1 = static_cast<float>(1.0 - h.beta1);
  s.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  s.one_minus_beta3 = static_cast<float>(1.0 - h.beta3);
  s.beta1_squared = static_cast<float>(h.beta1 * h.beta1);
  s.eps1 = static_cast<float>(h.eps1);
  s.eps2 = static_cast<float>(h.eps2);
  s.clip_threshold = static_cast<float>(h.clip_threshold);
  s.lr = static_cast<float>(h.lr);
  s.shrink = shrink_of(h.lr, h.weight_decay);
  s.weight_decay = static_cast<float>(h.weight_decay);
  s.lr_tensor = h.lr_tensor;
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
  std::vector<Arguments> all = kCheck.common(params, grads, exp_avg, absmax, step, skipped, views);
  kCheck.factored(all, exp_avg_sq_row, exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col, rms_ratio);
  const Settings settings = settings_of(kCheck.hyper(lr_tensor, hyper, options));
  std::vector<HostParameter> parameters = parameters_of(all);
  if (!parameters.empty()) factored_step(parameters, settings, params[0]);
}

void unfactored_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors absmax,
                      Tensors exp_avg_sq, Tensors step, Tensors skipped, std::vector<int64_t> views,
                      std::optional<Tensor> lr_tensor, std::vector<double> hyper,
                      std::vector<int64_t> options) {
  std::vector<Arguments> all = kCheck.common(params, grads, exp_avg, absmax, step, skipped, views);
  kCheck.unfactored(all, exp_avg_sq);
  const Settings settings = settings_of(kCheck.hyper(lr_tensor, hyper, options));
  std::vector<HostParameter> parameters = parameters_of(all);
  if (!parameters.empty()) unfactored_step(parameters, settings, params[0]);
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x) {
  const DeviceGuard guard(x);
  const QuantizeArguments a = quantize_arguments(x);
  quantize(static_cast<const float*>(a.values.data_ptr()), a.slices, a.slice_len,
           static_cast<int8_t*>(a.codes.data_ptr()), static_cast<float*>(a.absmax.data_ptr()),
           current_stream(x));
  return {a.codes, a.absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax) {
  const DeviceGuard guard(codes);
  const QuantizeArguments a = dequantize_arguments(codes, absmax);
  dequantize(static_cast<const int8_t*>(a.codes.data_ptr()),
             static_cast<const float*>(a.absmax.data_ptr()), a.slices, a.slice_len,
             static_cast<float*>(a.values.data_ptr()), current_stream(codes));
  return a.values;
}

}  // namespace
}  // namespace came8bit

CAME8BIT_LIBRARY_IMPL(m) {
  m.impl("factored_step_", TORCH_BOX(&came8bit::factored_step_));
  m.impl("unfactored_step_", TORCH_BOX(&came8bit::unfactored_step_));
  m.impl("quantize_blockwise", TORCH_BOX(&came8bit::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&came8bit::dequantize_blockwise));
}
