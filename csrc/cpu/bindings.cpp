// Registers the kernels for CPU tensors; the schemas are in came8bit/_ops.py. Everything is checked
// here, before the first thread starts and the first byte changes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "parallel.h"
#include "step.h"

namespace came8bit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr size_t kViewInts = 5;
constexpr size_t kHyperFloats = 8;
constexpr size_t kOptionInts = 6;

Dtype dtype_of(const Tensor& t, const char* what, size_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBfloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, what, " ", i, ": expected float32, bfloat16 or float16");
  }
  return kFloat32;
}

Strided strided(const Tensor& t, const char* what, size_t i) {
  STD_TORCH_CHECK(t.is_cpu(), what, " ", i, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() <= kMaxDims, what, " ", i, ": got ", t.dim(),
                  " dimensions, expected at most ", kMaxDims);
  return Strided(t.data_ptr(), dtype_of(t, what, i), static_cast<int>(t.dim()), t.sizes().data(),
                 t.strides().data());
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if (sizeof(T) == 1) return ScalarType::Char;
  return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Long;
}

// Pointer to contiguous state of `size` values of T: int8_t, float or int64_t.
template <class T>
T* state(const Tensors& tensors, size_t i, int64_t size, const char* name) {
  const Tensor& t = tensors[i];
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == scalar_type_of<T>() &&
                      t.numel() == size,
                  name, " ", i, ": expected a contiguous CPU tensor of ", size, " values of ",
                  sizeof(T), " bytes, got ", t.numel(), " of ", t.element_size());
  return static_cast<T*>(t.data_ptr());
}

void check_length(const Tensors& tensors, size_t expected, const char* name) {
  STD_TORCH_CHECK(tensors.size() == expected, name, ": got ", tensors.size(), " tensors, expected ",
                  expected);
}

void check_same_sizes(const Tensor& param, const Tensor& grad, size_t i) {
  bool same = param.dim() == grad.dim();
  for (int64_t d = 0; same && d < param.dim(); ++d) same = param.size(d) == grad.size(d);
  STD_TORCH_CHECK(same, "gradient ", i, ": expected the shape of parameter ", i,
                  ", got another one with ", grad.numel(), " elements for ", param.numel());
}

// What both kinds of step have: parameter, gradient, momentum, counters, geometry.
std::vector<Parameter> common(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                              const Tensors& absmax, const Tensors& step, const Tensors& skipped,
                              const std::vector<int64_t>& views) {
  const size_t count = params.size();
  check_length(grads, count, "grads");
  check_length(exp_avg, count, "exp_avg");
  if (!absmax.empty()) check_length(absmax, count, "absmax");
  check_length(step, count, "step");
  check_length(skipped, count, "skipped");
  STD_TORCH_CHECK(views.size() == count * kViewInts, "views: got ", views.size(),
                  " integers, expected ", count * kViewInts);
  std::vector<Parameter> parameters(count);
  for (size_t i = 0; i < count; ++i) {
    Parameter& p = parameters[i];
    const int64_t* view = views.data() + i * kViewInts;
    p.param = strided(params[i], "parameter", i);
    p.grad = strided(grads[i], "gradient", i);
    p.b = view[0];
    p.n = view[1];
    p.k = view[2];
    p.index = static_cast<uint32_t>(view[3]);
    p.offset = static_cast<uint64_t>(view[4]);
    check_same_sizes(params[i], grads[i], i);
    const int64_t numel = params[i].numel();
    STD_TORCH_CHECK(p.numel() == numel, "parameter ", i, ": got ", numel,
                    " elements and a view of ", p.numel());
    const int64_t dims = params[i].dim();
    p.slices = dims < 2 ? 1 : params[i].size(0);
    p.slice_len = p.slices > 0 ? numel / p.slices : 0;
    if (absmax.empty()) {
      p.exp_avg = state<float>(exp_avg, i, numel, "exp_avg");
    } else {
      const int64_t blocks = p.slices * ((p.slice_len + kBlockSize - 1) / kBlockSize);
      p.exp_avg = state<int8_t>(exp_avg, i, numel, "exp_avg");
      p.absmax = state<float>(absmax, i, blocks, "absmax");
    }
    p.step = state<int64_t>(step, i, 1, "step");
    p.skipped = state<int64_t>(skipped, i, 1, "skipped");
  }
  return parameters;
}

Settings settings_of(const std::optional<Tensor>& lr_tensor, const std::vector<double>& hyper,
                     const std::vector<int64_t>& options) {
  STD_TORCH_CHECK(hyper.size() == kHyperFloats, "hyper: got ", hyper.size(), " values, expected ",
                  kHyperFloats);
  STD_TORCH_CHECK(options.size() == kOptionInts, "options: got ", options.size(),
                  " values, expected ", kOptionInts);
  Settings s = {};
  s.beta1 = hyper[0];
  s.beta2 = hyper[1];
  s.beta3 = hyper[2];
  s.eps1 = static_cast<float>(hyper[3]);
  s.eps2 = static_cast<float>(hyper[4]);
  s.clip_threshold = static_cast<float>(hyper[5]);
  s.lr = static_cast<float>(hyper[6]);
  s.shrink = static_cast<float>(hyper[6] * hyper[7]);
  if (lr_tensor.has_value()) {
    s.lr = *state<float>({*lr_tensor}, 0, 1, "lr_tensor");
    s.shrink = s.lr * static_cast<float>(hyper[7]);
  }
  s.stochastic = options[0] != 0;
  s.cautious = options[1] != 0;
  s.propagate = options[2] != 0;
  s.maximize = options[3] != 0;
  s.bias_correction = options[4] != 0;
  s.seed = static_cast<uint64_t>(options[5]);
  return s;
}

void factored_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors absmax,
                    Tensors exp_avg_sq_row, Tensors exp_avg_sq_col, Tensors exp_avg_res_row,
                    Tensors exp_avg_res_col, Tensors rms_ratio, Tensors step, Tensors skipped,
                    std::vector<int64_t> views, std::optional<Tensor> lr_tensor,
                    std::vector<double> hyper, std::vector<int64_t> options) {
  const FloatEnvironment environment;  // also for the scalars of a call
  std::vector<Parameter> parameters = common(params, grads, exp_avg, absmax, step, skipped, views);
  const size_t count = parameters.size();
  check_length(exp_avg_sq_row, count, "exp_avg_sq_row");
  check_length(exp_avg_sq_col, count, "exp_avg_sq_col");
  check_length(exp_avg_res_row, count, "exp_avg_res_row");
  check_length(exp_avg_res_col, count, "exp_avg_res_col");
  check_length(rms_ratio, count, "rms_ratio");
  for (size_t i = 0; i < count; ++i) {
    Parameter& p = parameters[i];
    p.sq_row = state<float>(exp_avg_sq_row, i, p.b * p.n, "exp_avg_sq_row");
    p.sq_col = state<float>(exp_avg_sq_col, i, p.b * p.k, "exp_avg_sq_col");
    p.res_row = state<float>(exp_avg_res_row, i, p.b * p.n, "exp_avg_res_row");
    p.res_col = state<float>(exp_avg_res_col, i, p.b * p.k, "exp_avg_res_col");
    p.rms_ratio = state<float>(rms_ratio, i, 1, "rms_ratio");
  }
  factored_step(parameters, settings_of(lr_tensor, hyper, options));
}

void unfactored_step_(Tensors params, Tensors grads, Tensors exp_avg, Tensors absmax,
                      Tensors exp_avg_sq, Tensors step, Tensors skipped, std::vector<int64_t> views,
                      std::optional<Tensor> lr_tensor, std::vector<double> hyper,
                      std::vector<int64_t> options) {
  const FloatEnvironment environment;  // also for the scalars of a call
  std::vector<Parameter> parameters = common(params, grads, exp_avg, absmax, step, skipped, views);
  check_length(exp_avg_sq, parameters.size(), "exp_avg_sq");
  for (size_t i = 0; i < parameters.size(); ++i) {
    Parameter& p = parameters[i];
    p.exp_avg_sq = state<float>(exp_avg_sq, i, p.numel(), "exp_avg_sq");
    p.k = p.numel();  // rows do not matter here
    p.b = p.n = 1;
  }
  unfactored_step(parameters, settings_of(lr_tensor, hyper, options));
}

int64_t slices_of(const Tensor& t) {
  return t.dim() < 2 ? 1 : t.size(0);
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "quantize_blockwise: expected torch.float32; cast first");
  const Tensor values = torch::stable::contiguous(x);
  const int64_t slices = slices_of(x), slice_len = slices > 0 ? x.numel() / slices : 0;
  const int64_t blocks = (slice_len + kBlockSize - 1) / kBlockSize;
  Tensor codes = torch::stable::new_empty(values, x.sizes(), ScalarType::Char);
  Tensor absmax = torch::stable::new_empty(values, {slices, blocks}, ScalarType::Float);
  quantize(static_cast<const float*>(values.data_ptr()), slices, slice_len,
           static_cast<int8_t*>(codes.data_ptr()), static_cast<float*>(absmax.data_ptr()));
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Char && absmax.scalar_type() == ScalarType::Float,
      "dequantize_blockwise: expected codes torch.int8 and absmax torch.float32");
  const int64_t slices = slices_of(codes), slice_len = slices > 0 ? codes.numel() / slices : 0;
  const int64_t blocks = (slice_len + kBlockSize - 1) / kBlockSize;
  STD_TORCH_CHECK(absmax.dim() == 2 && absmax.size(0) == slices && absmax.size(1) == blocks,
                  "dequantize_blockwise: expected absmax of shape (", slices, ", ", blocks, ")");
  const Tensor packed = torch::stable::contiguous(codes),
               scales = torch::stable::contiguous(absmax);
  Tensor x = torch::stable::new_empty(packed, codes.sizes(), ScalarType::Float);
  dequantize(static_cast<const int8_t*>(packed.data_ptr()),
             static_cast<const float*>(scales.data_ptr()), slices, slice_len,
             static_cast<float*>(x.data_ptr()));
  return x;
}

}  // namespace
}  // namespace came8bit

STABLE_TORCH_LIBRARY_IMPL(came8bit, CPU, m) {
  m.impl("factored_step_", TORCH_BOX(&came8bit::factored_step_));
  m.impl("unfactored_step_", TORCH_BOX(&came8bit::unfactored_step_));
  m.impl("quantize_blockwise", TORCH_BOX(&came8bit::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&came8bit::dequantize_blockwise));
}
