// What the operators of came8bit/ops/schema.py are given, checked before anything runs, as plain
// pointers. The bindings of every device use it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "param_arguments.h"
#include "quant.h"
#include "step_settings.h"

namespace came8bit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The device that an operator was registered for.
struct Device {
  const char* name;
  bool (*holds)(const Tensor&);
};

class Checker {
 public:
  explicit Checker(const Device& device) : device_(device) {}

  Dtype dtype(const Tensor& t, const char* what, size_t i) const {
    STD_TORCH_CHECK(device_.holds(t), what, " ", i, ": expected a ", device_.name, " tensor");
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

  // Pointer to contiguous state of `size` values of T: int8_t, uint8_t, uint16_t for bf16, float,
  // double or int64_t.
  template <class T>
  T* state(const Tensors& tensors, size_t i, int64_t size, const char* name) const {
    const Tensor& t = tensors[i];
    STD_TORCH_CHECK(device_.holds(t) && t.is_contiguous() &&
                        t.scalar_type() == scalar_type_of<T>() && t.numel() == size,
                    name, " ", i, ": expected a contiguous ", device_.name, " tensor of ", size,
                    " values of ", sizeof(T), " bytes, got ", t.numel(), " of ", t.element_size());
    T* values = static_cast<T*>(t.data_ptr());
    STD_TORCH_CHECK(values != nullptr || size == 0, name, " ", i, ": its memory has been freed");
    return values;
  }

  template <class T>
  static void length(const std::vector<T>& list, size_t expected, const char* name) {
    STD_TORCH_CHECK(list.size() == expected, name, ": got ", list.size(), " values, expected ",
                    expected);
  }

  // What both kinds of step have: parameter, gradient, momentum, counters.
  std::vector<ParamArguments> common(const Tensors& params, const Tensors& grads,
                                     const Tensors& exp_avg, const Tensors& absmax,
                                     const Tensors& step, const Tensors& skipped,
                                     const std::vector<int64_t>& param_index,
                                     const std::vector<int64_t>& element_offset,
                                     const std::optional<Tensor>& grad_squares) const {
    const size_t count = params.size();
    length(grads, count, "grads");
    length(exp_avg, count, "exp_avg");
    if (!absmax.empty()) length(absmax, count, "absmax");
    length(step, count, "step");
    length(skipped, count, "skipped");
    length(param_index, count, "param_index");
    length(element_offset, count, "element_offset");
    float* squares = optional(grad_squares, static_cast<int64_t>(count), "grad_squares");
    std::vector<ParamArguments> all(count);
    for (size_t i = 0; i < count; ++i) {
      ParamArguments& a = all[i];
      a.param_dtype = dtype(params[i], "parameter", i);
      a.grad_dtype = dtype(grads[i], "gradient", i);
      a.index = static_cast<uint32_t>(param_index[i]);
      a.offset = static_cast<uint64_t>(element_offset[i]);
      same_sizes(params[i], grads[i], i);
      const int64_t numel = params[i].numel();
      a.slices = params[i].dim() < 2 ? 1 : params[i].size(0);
      a.slice_len = a.slices > 0 ? numel / a.slices : 0;
      a.blocks_per_slice = (a.slice_len + kBlockSize - 1) / kBlockSize;
      a.bits = 32;
      if (absmax.empty()) {
        a.exp_avg = state<float>(exp_avg, i, numel, "exp_avg");
      } else if (exp_avg[i].scalar_type() == ScalarType::Byte) {
        a.bits = absmax[i].dim() == 2 ? 4 : absmax[i].numel() > 0 ? 2 : 0;
        a.blocks_per_slice = (a.slice_len + kCoarseBlock - 1) / kCoarseBlock;
        a.exp_avg =
            state<uint8_t>(exp_avg, i, a.slices * bytes_of_slice(a.slice_len, a.bits), "exp_avg");
        a.scales = state<uint16_t>(
            absmax, i, a.slices * a.blocks_per_slice * scales_of_block(a.bits), "absmax");
      } else {
        a.bits = 8;
        a.exp_avg = state<int8_t>(exp_avg, i, numel, "exp_avg");
        a.absmax = state<float>(absmax, i, a.slices * a.blocks_per_slice, "absmax");
      }
      a.step = state<int64_t>(step, i, 1, "step");
      a.skipped = state<int64_t>(skipped, i, 1, "skipped");
      a.grad_square = squares ? squares + i : nullptr;
    }
    apart(all);
    return all;
  }

  // Adds the row and column statistics; their shapes, (b, n) and (b, k), say what the matrices are.
  void factored(std::vector<ParamArguments>& all, const Tensors& sq_row, const Tensors& sq_col,
                const Tensors& res_row, const Tensors& res_col, const Tensors& rms_ratio) const {
    length(sq_row, all.size(), "exp_avg_sq_row");
    length(sq_col, all.size(), "exp_avg_sq_col");
    length(res_row, all.size(), "exp_avg_res_row");
    length(res_col, all.size(), "exp_avg_res_col");
    length(rms_ratio, all.size(), "rms_ratio");
    for (size_t i = 0; i < all.size(); ++i) {
      ParamArguments& a = all[i];
      const Tensor &row = sq_row[i], &col = sq_col[i];
      STD_TORCH_CHECK(row.dim() == 2, "exp_avg_sq_row ", i, ": expected two dimensions, got ",
                      row.dim());
      STD_TORCH_CHECK(col.dim() == 2 && col.size(0) == row.size(0), "exp_avg_sq_col ", i,
                      ": expected the same number of matrices as in exp_avg_sq_row, ", row.size(0));
      a.b = row.size(0);
      a.n = row.size(1);
      a.k = col.size(1);
      STD_TORCH_CHECK(a.numel() == a.slices * a.slice_len, "parameter ", i, ": got ",
                      a.slices * a.slice_len, " elements and statistics of ", a.numel());
      a.sq_row = state<float>(sq_row, i, a.b * a.n, "exp_avg_sq_row");
      a.sq_col = state<float>(sq_col, i, a.b * a.k, "exp_avg_sq_col");
      a.res_row = state<float>(res_row, i, a.b * a.n, "exp_avg_res_row");
      a.res_col = state<float>(res_col, i, a.b * a.k, "exp_avg_res_col");
      a.rms_ratio = state<float>(rms_ratio, i, 1, "rms_ratio");
    }
  }

  // Adds the full second moment.
  void unfactored(std::vector<ParamArguments>& all, const Tensors& exp_avg_sq) const {
    length(exp_avg_sq, all.size(), "exp_avg_sq");
    for (size_t i = 0; i < all.size(); ++i) {
      ParamArguments& a = all[i];
      a.b = 1;
      a.n = a.slices;
      a.k = a.slice_len;
      a.exp_avg_sq = state<float>(exp_avg_sq, i, a.numel(), "exp_avg_sq");
    }
  }

  // What the passes have besides, with the sizes of came8bit/reference/passes.py.
  std::vector<SharedArguments> shared(const std::vector<ParamArguments>& all, Pass pass,
                                      bool factored, bool cautious,
                                      const std::vector<int64_t>& full_numel,
                                      const std::vector<int64_t>& full_rows, const Tensors& reduced,
                                      const Tensors& sums, const Tensors& work) const {
    length(full_numel, all.size(), "full_numel");
    length(full_rows, all.size(), "full_rows");
    length(work, all.size(), "work");
    const int number = static_cast<int>(pass);
    if (number > 0) length(reduced, all.size(), "reduced");
    if (pass != Pass::kApply) length(sums, all.size(), "sums");
    std::vector<SharedArguments> found(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
      const ParamArguments& a = all[i];
      const bool split = factored && full_rows[i] > 0;
      const int64_t k = split ? a.k : 0, one = cautious ? 1 : 0;
      STD_TORCH_CHECK(!split || a.b == 1, "full_rows ", i, ": expected one matrix, got ", a.b);
      const int64_t sizes[3] = {split ? 3 + k : (factored ? 2 : 1), 1 + 3 * k,
                                split ? 1 + one : one};
      SharedArguments& s = found[i];
      s.full_numel = full_numel[i];
      s.full_rows = split ? full_rows[i] : 0;
      s.reduced = number > 0 ? state<double>(reduced, i, sizes[number - 1], "reduced") : nullptr;
      s.sums_size = pass == Pass::kApply ? 0 : sizes[number];
      s.sums = pass == Pass::kApply ? nullptr : state<double>(sums, i, s.sums_size, "sums");
      s.work = state<float>(work, i, kKept + (factored ? 5 * a.b * (a.n + a.k) : 0), "work");
    }
    return found;
  }

  // Pointer to `size` floats, or null.
  float* optional(const std::optional<Tensor>& t, int64_t size, const char* name) const {
    return t.has_value() ? state<float>({*t}, 0, size, name) : nullptr;
  }

 private:
  template <class T>
  static constexpr ScalarType scalar_type_of() {
    if (sizeof(T) == 1) return T(-1) < T(0) ? ScalarType::Char : ScalarType::Byte;
    if (sizeof(T) == 2) return ScalarType::BFloat16;
    if (T(0.5) != T(0)) return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    return ScalarType::Long;
  }

  // Whoever lets parameters share state shares the counters as well: one would do for all buffers,
  // and hundreds of pointers are sorted in microseconds.
  static void apart(const std::vector<ParamArguments>& all) {
    std::vector<const int64_t*> counters;
    counters.reserve(all.size());
    for (const ParamArguments& a : all) counters.push_back(a.step);
    std::sort(counters.begin(), counters.end(), std::less<>());
    const auto twice = std::adjacent_find(counters.begin(), counters.end());
    STD_TORCH_CHECK(twice == counters.end(), "step: two parameters share one counter");
  }

  static void same_sizes(const Tensor& param, const Tensor& grad, size_t i) {
    const auto sizes = param.sizes(), others = grad.sizes();
    const bool same = std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
    STD_TORCH_CHECK(same, "gradient ", i, ": expected the shape of parameter ", i,
                    ", got another one with ", grad.numel(), " elements for ", param.numel());
  }

  Device device_;
};

// --- steps ------------------------------------------------------------------------------------

// The operators on a device `On`, which runs steps of checked arguments: see bindings.cpp.
template <class On>
void factored_step_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                    const Tensors& absmax, const Tensors& exp_avg_sq_row,
                    const Tensors& exp_avg_sq_col, const Tensors& exp_avg_res_row,
                    const Tensors& exp_avg_res_col, const Tensors& rms_ratio, const Tensors& step,
                    const Tensors& skipped, const std::vector<int64_t>& param_index,
                    const std::vector<int64_t>& element_offset,
                    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                    double beta3, double eps1, double eps2, double clip_threshold,
                    double weight_decay, bool stochastic, bool cautious, bool propagate,
                    bool maximize, bool bias_correction, bool nesterov, int64_t seed,
                    const std::optional<Tensor>& grad_squares) {
  [[maybe_unused]] const typename On::Environment environment;  // for the scalars, too
  const Checker check(On::device());
  std::vector<ParamArguments> all = check.common(params, grads, exp_avg, absmax, step, skipped,
                                                 param_index, element_offset, grad_squares);
  check.factored(all, exp_avg_sq_row, exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col, rms_ratio);
  On::factored(all, params, grads,
               StepSettings(check.optional(lr_tensor, 1, "lr_tensor"), lr, beta1, beta2, beta3,
                            eps1, eps2, clip_threshold, weight_decay, stochastic, cautious,
                            propagate, maximize, bias_correction, nesterov, seed));
}

template <class On>
void unfactored_step_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                      const Tensors& absmax, const Tensors& exp_avg_sq, const Tensors& step,
                      const Tensors& skipped, const std::vector<int64_t>& param_index,
                      const std::vector<int64_t>& element_offset,
                      const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                      double beta3, double eps1, double eps2, double clip_threshold,
                      double weight_decay, bool stochastic, bool cautious, bool propagate,
                      bool maximize, bool bias_correction, bool nesterov, int64_t seed,
                      const std::optional<Tensor>& grad_squares) {
  [[maybe_unused]] const typename On::Environment environment;
  const Checker check(On::device());
  std::vector<ParamArguments> all = check.common(params, grads, exp_avg, absmax, step, skipped,
                                                 param_index, element_offset, grad_squares);
  check.unfactored(all, exp_avg_sq);
  On::unfactored(all, params, grads,
                 StepSettings(check.optional(lr_tensor, 1, "lr_tensor"), lr, beta1, beta2, beta3,
                              eps1, eps2, clip_threshold, weight_decay, stochastic, cautious,
                              propagate, maximize, bias_correction, nesterov, seed));
}

// The passes of a step; `P` is the device and the pass.

template <class P>
void factored_pass_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                    const Tensors& absmax, const Tensors& exp_avg_sq_row,
                    const Tensors& exp_avg_sq_col, const Tensors& exp_avg_res_row,
                    const Tensors& exp_avg_res_col, const Tensors& rms_ratio, const Tensors& step,
                    const Tensors& skipped, const std::vector<int64_t>& param_index,
                    const std::vector<int64_t>& element_offset,
                    const std::vector<int64_t>& full_numel, const std::vector<int64_t>& full_rows,
                    const Tensors& reduced, const Tensors& sums, const Tensors& work,
                    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                    double beta3, double eps1, double eps2, double clip_threshold,
                    double weight_decay, bool stochastic, bool cautious, bool propagate,
                    bool maximize, bool bias_correction, bool nesterov, int64_t seed) {
  [[maybe_unused]] const typename P::On::Environment environment;
  const Checker check(P::On::device());
  std::vector<ParamArguments> all = check.common(params, grads, exp_avg, absmax, step, skipped,
                                                 param_index, element_offset, std::nullopt);
  check.factored(all, exp_avg_sq_row, exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col, rms_ratio);
  P::On::factored_pass(
      P::pass, all,
      check.shared(all, P::pass, true, cautious, full_numel, full_rows, reduced, sums, work),
      params, grads,
      StepSettings(check.optional(lr_tensor, 1, "lr_tensor"), lr, beta1, beta2, beta3, eps1, eps2,
                   clip_threshold, weight_decay, stochastic, cautious, propagate, maximize,
                   bias_correction, nesterov, seed));
}

template <class P>
void unfactored_pass_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                      const Tensors& absmax, const Tensors& exp_avg_sq, const Tensors& step,
                      const Tensors& skipped, const std::vector<int64_t>& param_index,
                      const std::vector<int64_t>& element_offset,
                      const std::vector<int64_t>& full_numel, const std::vector<int64_t>& full_rows,
                      const Tensors& reduced, const Tensors& sums, const Tensors& work,
                      const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2,
                      double beta3, double eps1, double eps2, double clip_threshold,
                      double weight_decay, bool stochastic, bool cautious, bool propagate,
                      bool maximize, bool bias_correction, bool nesterov, int64_t seed) {
  [[maybe_unused]] const typename P::On::Environment environment;
  const Checker check(P::On::device());
  std::vector<ParamArguments> all = check.common(params, grads, exp_avg, absmax, step, skipped,
                                                 param_index, element_offset, std::nullopt);
  check.unfactored(all, exp_avg_sq);
  P::On::unfactored_pass(
      P::pass, all,
      check.shared(all, P::pass, false, cautious, full_numel, full_rows, reduced, sums, work),
      params, grads,
      StepSettings(check.optional(lr_tensor, 1, "lr_tensor"), lr, beta1, beta2, beta3, eps1, eps2,
                   clip_threshold, weight_decay, stochastic, cautious, propagate, maximize,
                   bias_correction, nesterov, seed));
}

template <class Device, Pass number>
struct PassOn {
  using On = Device;
  static constexpr Pass pass = number;
};

template <class On, class Library>
void register_passes(Library& m) {
  using SecondMoment = PassOn<On, Pass::kSecondMoment>;
  using Instability = PassOn<On, Pass::kInstability>;
  using Confidence = PassOn<On, Pass::kConfidence>;
  using Apply = PassOn<On, Pass::kApply>;
  m.impl("factored_second_moment_", TORCH_BOX(&factored_pass_<SecondMoment>));
  m.impl("factored_instability_", TORCH_BOX(&factored_pass_<Instability>));
  m.impl("factored_confidence_", TORCH_BOX(&factored_pass_<Confidence>));
  m.impl("factored_apply_", TORCH_BOX(&factored_pass_<Apply>));
  m.impl("unfactored_second_moment_", TORCH_BOX(&unfactored_pass_<SecondMoment>));
  m.impl("unfactored_instability_", TORCH_BOX(&unfactored_pass_<Instability>));
  m.impl("unfactored_confidence_", TORCH_BOX(&unfactored_pass_<Confidence>));
  m.impl("unfactored_apply_", TORCH_BOX(&unfactored_pass_<Apply>));
}

// --- codec ------------------------------------------------------------------------------------

// Contiguous tensors of a call, and the cut into slices.
struct QuantizeArguments {
  Tensor values, codes, absmax;
  int64_t slices, slice_len;
};

inline int64_t slices_of(const Tensor& t) {
  return t.dim() < 2 ? 1 : t.size(0);
}

// `codes` and `absmax` are new.
inline QuantizeArguments quantize_arguments(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "quantize_blockwise: expected torch.float32; cast first");
  const int64_t slices = slices_of(x), slice_len = slices > 0 ? x.numel() / slices : 0;
  const int64_t blocks = (slice_len + kBlockSize - 1) / kBlockSize;
  return {torch::stable::contiguous(x), torch::stable::new_empty(x, x.sizes(), ScalarType::Char),
          torch::stable::new_empty(x, {slices, blocks}, ScalarType::Float), slices, slice_len};
}

// `values` is new.
inline QuantizeArguments dequantize_arguments(const Tensor& codes, const Tensor& absmax) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Char && absmax.scalar_type() == ScalarType::Float,
      "dequantize_blockwise: expected codes torch.int8 and absmax torch.float32");
  STD_TORCH_CHECK(codes.is_cuda() == absmax.is_cuda() && codes.is_cpu() == absmax.is_cpu(),
                  "dequantize_blockwise: expected codes and absmax on one device");
  const int64_t slices = slices_of(codes), slice_len = slices > 0 ? codes.numel() / slices : 0;
  const int64_t blocks = (slice_len + kBlockSize - 1) / kBlockSize;
  STD_TORCH_CHECK(absmax.dim() == 2 && absmax.size(0) == slices && absmax.size(1) == blocks,
                  "dequantize_blockwise: expected absmax of shape (", slices, ", ", blocks, ")");
  return {torch::stable::new_empty(codes, codes.sizes(), ScalarType::Float),
          torch::stable::contiguous(codes), torch::stable::contiguous(absmax), slices, slice_len};
}

}  // namespace came8bit
