// Registers the kernels for CUDA tensors; the schemas are in came8bit/ops/schema.py. Everything is
// checked here, before the first launch.
#include "../op_arguments.h"
#include "step.h"

namespace came8bit {
namespace {

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

std::vector<HostParameter> parameters_of(const std::vector<ParamArguments>& all,
                                         const Tensors& params, const Tensors& grads,
                                         const std::vector<SharedArguments>& shared = {}) {
  std::vector<HostParameter> parameters(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Tensor &param = params[i], &grad = grads[i];
    HostParameter& h = parameters[i];
    STD_TORCH_CHECK(param.get_device_index() == params[0].get_device_index() &&
                        grad.get_device_index() == params[0].get_device_index(),
                    "parameter ", i, ": expected all parameters and gradients on one device");
    h.param_strides = strides_of(param, "parameter", i);
    h.grad_strides = strides_of(grad, "gradient", i);
    h.bits = all[i].bits;
    h.shared = shared.empty() ? SharedArguments{} : shared[i];
    Parameter& p = h.parameter;
    const ParamArguments& a = all[i];
    p = {};
    p.param = {param.data_ptr(), nullptr, a.param_dtype};
    p.grad = {grad.data_ptr(), nullptr, a.grad_dtype};
    p.exp_avg = a.exp_avg;
    p.absmax = a.scales == nullptr ? a.absmax : reinterpret_cast<float*>(a.scales);
    p.bits = a.bits;
    p.sq_row = a.sq_row;
    p.sq_col = a.sq_col;
    p.res_row = a.res_row;
    p.res_col = a.res_col;
    p.rms_ratio = a.rms_ratio;
    p.exp_avg_sq = a.exp_avg_sq;
    p.step = a.step;
    p.skipped = a.skipped;
    p.grad_square = a.grad_square;
    p.b = a.b;
    p.n = a.n;
    p.k = a.k;
    p.slices = a.slices;
    p.slice_len = a.slice_len;
    p.blocks_per_slice = a.blocks_per_slice;
    p.offset = a.offset;
    p.index = a.index;
    p.byte_pattern = kBytePattern;
  }
  return parameters;
}

struct Cuda {
  struct Environment {};

  static Device device() { return {kDeviceName, is_device_tensor}; }

  static void factored(const std::vector<ParamArguments>& all, const Tensors& params,
                       const Tensors& grads, const StepSettings& settings) {
    std::vector<HostParameter> parameters = parameters_of(all, params, grads);
    if (!parameters.empty()) factored_step(parameters, settings, params[0]);
  }

  static void unfactored(const std::vector<ParamArguments>& all, const Tensors& params,
                         const Tensors& grads, const StepSettings& settings) {
    std::vector<HostParameter> parameters = parameters_of(all, params, grads);
    if (!parameters.empty()) unfactored_step(parameters, settings, params[0]);
  }

  static void factored_pass(Pass pass, const std::vector<ParamArguments>& all,
                            const std::vector<SharedArguments>& shared, const Tensors& params,
                            const Tensors& grads, const StepSettings& settings) {
    std::vector<HostParameter> parameters = parameters_of(all, params, grads, shared);
    if (!parameters.empty()) came8bit::factored_pass(pass, parameters, settings, params[0]);
  }

  static void unfactored_pass(Pass pass, const std::vector<ParamArguments>& all,
                              const std::vector<SharedArguments>& shared, const Tensors& params,
                              const Tensors& grads, const StepSettings& settings) {
    std::vector<HostParameter> parameters = parameters_of(all, params, grads, shared);
    if (!parameters.empty()) came8bit::unfactored_pass(pass, parameters, settings, params[0]);
  }
};

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
  m.impl("factored_step_", TORCH_BOX(&came8bit::factored_step_<came8bit::Cuda>));
  m.impl("unfactored_step_", TORCH_BOX(&came8bit::unfactored_step_<came8bit::Cuda>));
  came8bit::register_passes<came8bit::Cuda>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&came8bit::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&came8bit::dequantize_blockwise));
}
