// Groups parameters, lays out their workspace and queues the launches of a step.
#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <tuple>

#include "kernels.cuh"

namespace came8bit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kAnyType = -1;
constexpr int64_t kAlignment = 256;  // of every array in the workspace

// --- workspace --------------------------------------------------------------------------------

// Hands out aligned pieces of memory that starts at `base`; with a null base it only measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

void lay_out_factored(Parameter& p, Access access, bool cautious, Arena& arena) {
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  p.row_part = arena.take<float>(3 * p.grid.strips * rows);
  p.col_part = arena.take<float>(3 * p.grid.slabs * cols);
  p.tile_sum = arena.take<float>(p.tiles());
  p.row_new = arena.take<float>(rows);
  p.col_new = arena.take<float>(cols);
  p.row_gain = arena.take<float>(rows);
  p.col_factor = arena.take<float>(cols);
  p.update_row = arena.take<float>(rows);
  p.update_col = arena.take<float>(cols);
  p.row_chunk = arena.take<float>(3 * p.b * p.row_chunks());
  p.col_chunk = arena.take<float>(p.b * p.col_chunks());
  p.root_mean = arena.take<float>(p.b);
  p.total = arena.take<float>(p.b);
  p.predicted = arena.take<float>(p.b);
  p.agreeing = cautious ? arena.take<int>(apply_tasks(p, access)) : nullptr;
}

void lay_out_flat(Parameter& p, Access, bool cautious, Arena& arena) {
  p.tile_sum = arena.take<float>(2 * flat_tiles(p));
  p.agreeing = cautious ? arena.take<int>(flat_apply_tasks(p)) : nullptr;
}

// --- groups -----------------------------------------------------------------------------------

// Parameters of one kind run the same kernels.
struct Kind {
  bool small, is8bit;
  Access access;
  int param_type, grad_type;  // kAnyType where kernels find out when running

  bool operator<(const Kind& other) const {
    return std::tie(small, access, is8bit, param_type, grad_type) <
           std::tie(other.small, other.access, other.is8bit, other.param_type, other.grad_type);
  }
};

// Parameters whose sweeps are launched together.
struct Group {
  Kind kind;
  std::vector<size_t> members;
};

bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

Access access_of(const HostParameter& h, bool factored) {
  const Parameter& p = h.parameter;
  if (h.param_strides.dims != 0 || h.grad_strides.dims != 0) return kOneByOne;
  if (!aligned(p.param.data, 16) || !aligned(p.grad.data, 16) || !aligned(p.exp_avg, 16)) {
    return kOneByOne;
  }
  if (p.offset % kVector != 0) return kOneByOne;
  if (!factored) return !h.is8bit || p.slice_len % kVector == 0 ? kTiles : kOneByOne;
  if (p.k % kVector != 0) return kOneByOne;
  return !h.is8bit || p.whole_blocks ? kTiles : kBlocks;
}

Kind kind_of(const HostParameter& h, bool factored, const Tuning& tuning) {
  const Parameter& p = h.parameter;
  Kind kind = {};
  kind.access = access_of(h, factored);
  kind.is8bit = h.is8bit;
  kind.small =
      kind.access == kTiles && (factored || !h.is8bit) && p.numel() <= tuning.small_elements;
  kind.param_type = kind.grad_type = kAnyType;
  if (kind.access != kOneByOne && !kind.small && factored) {
    kind.grad_type = p.grad.dtype;
    if (p.param.dtype == p.grad.dtype) kind.param_type = p.param.dtype;
  }
#if defined(CAME8BIT_FEW_TYPES)
  if (kind.grad_type == kFloat16) kind.param_type = kind.grad_type = kAnyType;
#endif
  return kind;
}

int64_t swept_bytes(const HostParameter& h) {
  const Parameter& p = h.parameter;
  return p.numel() * ((p.grad.dtype == kFloat32 ? 4 : 2) + (h.is8bit ? 1 : 4));
}

// Fills groups in order: of one kind, within `tuning.group_bytes` and `workspace` bytes, or of a
// single parameter.
template <class LayOut>
std::vector<Group> group(std::vector<HostParameter>& parameters, bool factored, bool cautious,
                         const Tuning& tuning, int64_t workspace, const LayOut& lay_out) {
  struct Open {
    Group group;
    int64_t swept = 0, used = 0;
  };
  std::map<Kind, Open> open;
  std::vector<Group> groups;
  for (size_t i = 0; i < parameters.size(); ++i) {
    HostParameter& h = parameters[i];
    if (h.parameter.numel() == 0) continue;
    const Kind kind = kind_of(h, factored, tuning);
    Arena measure(nullptr);
    lay_out(h.parameter, kind.access, cautious, measure);
    Open& o = open[kind];
    o.group.kind = kind;
    const int64_t swept = swept_bytes(h);
    if (!o.group.members.empty() && ((!kind.small && o.swept + swept > tuning.group_bytes) ||
                                     o.used + measure.used() > workspace)) {
      groups.push_back(std::move(o.group));
      o = Open();
      o.group.kind = kind;
    }
    o.group.members.push_back(i);
    o.swept += swept;
    o.used += measure.used();
  }
  for (auto& entry : open) {
    if (!entry.second.group.members.empty()) groups.push_back(std::move(entry.second.group));
  }
  return groups;
}

// --- launches ---------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

// Calls call(Type<T>()) with the type that `type` names.
template <class Call>
void with_type(int type, const Call& call) {
  switch (type) {
    case kFloat32:
      return call(Type<float>());
    case kBfloat16:
      return call(Type<Bf16>());
#if !defined(CAME8BIT_FEW_TYPES)
    case kFloat16:
      return call(Type<Half>());
#endif
    default:
      return call(Type<Any>());
  }
}

template <class Call>
void with_momentum(bool is8bit, const Call& call) {
  is8bit ? call(Type<int8_t>()) : call(Type<float>());
}

// One group on the device: where its parameters are, how many blocks each phase has.
struct Launches {
  const Parameter* parameters;
  int count;
  int64_t blocks[kPhases];
  cudaStream_t stream;

  template <class Kernel, class... Arguments>
  void run(Kernel kernel, int64_t blocks, Arguments... arguments) const {
    STD_TORCH_CHECK(blocks <= INT32_MAX, "a group of parameters needs ", blocks,
                    " blocks, the device allows ", INT32_MAX, "; step fewer parameters at once");
    launch(kernel, static_cast<unsigned>(blocks), kThreads, stream, parameters, arguments...);
  }
};

template <class M, Access access>
void run_factored(const Kind& kind, const Launches& l, const Settings& s) {
  constexpr bool fast = access != kOneByOne;
  // Types are known in the fast kernels only.
  const auto with_grad = [&](const auto& call) {
    if constexpr (fast) {
      with_type(kind.grad_type, call);
    } else {
      call(Type<Any>());
    }
  };
  with_grad([&](auto g) {
    using G = typename decltype(g)::type;
    l.run(second_moment_kernel<G, fast>, l.blocks[kSweepA], l.count);
  });
  l.run(second_moment_combine_kernel, l.blocks[kCombine], l.count, s);
  l.run(second_moment_scalars_kernel, l.count, s);
  with_grad([&](auto g) {
    using G = typename decltype(g)::type;
    l.run(residual_kernel<G, M, fast>, l.blocks[kSweepA], l.count, s);
  });
  l.run(residual_combine_kernel, l.blocks[kCombine], l.count, s);
  if (s.cautious) l.run(agreeing_kernel<M, access>, l.blocks[kSweepC], l.count, s);
  l.run(update_rows_kernel, l.blocks[kRows], l.count, s, access);
  if constexpr (access == kTiles) {
    with_type(kind.param_type, [&](auto t) {
      using T = typename decltype(t)::type;
      l.run(apply_kernel<T, T, M, access>, l.blocks[kSweepC], l.count, s);
    });
  } else {
    l.run(apply_kernel<Any, Any, M, access>, l.blocks[kSweepC], l.count, s);
  }
}

void run_factored(const Kind& kind, const Launches& l, const Settings& s) {
  with_momentum(kind.is8bit, [&](auto m) {
    using M = typename decltype(m)::type;
    if (kind.small) return l.run(small_factored_kernel<M>, l.count, s);
    if (kind.access == kTiles) return run_factored<M, kTiles>(kind, l, s);
    if (kind.access == kOneByOne) return run_factored<M, kOneByOne>(kind, l, s);
    if constexpr (sizeof(M) == 1) run_factored<M, kBlocks>(kind, l, s);
  });
}

template <class M, bool fast>
void run_flat(const Launches& l, const Settings& s) {
  l.run(flat_sum_kernel<fast, false>, l.blocks[kSweepA], l.count, s);
  l.run(flat_sum_kernel<fast, true>, l.blocks[kSweepA], l.count, s);
  if (s.cautious) l.run(flat_agreeing_kernel<M, fast>, l.blocks[kSweepC], l.count, s);
  l.run(flat_apply_kernel<M, fast>, l.blocks[kSweepC], l.count, s);
}

void run_flat(const Kind& kind, const Launches& l, const Settings& s) {
  if (kind.small) return l.run(small_flat_kernel, l.count, s);
  with_momentum(kind.is8bit, [&](auto m) {
    using M = typename decltype(m)::type;
    kind.access == kTiles ? run_flat<M, true>(l, s) : run_flat<M, false>(l, s);
  });
}

void count_blocks(Parameter& p, bool factored, Access access, int64_t* blocks) {
  for (int phase = 0; phase < kPhases; ++phase) p.first[phase] = blocks[phase];
  if (factored) {
    blocks[kSweepA] += p.tiles();
    blocks[kCombine] += p.b * (p.row_chunks() + p.col_chunks());
    blocks[kRows] += p.b * ((p.n + kThreads - 1) / kThreads);
    blocks[kSweepC] += apply_tasks(p, access);
  } else {
    blocks[kSweepA] += flat_tiles(p);
    blocks[kSweepC] += flat_apply_tasks(p);
  }
}

// Copies `items`, `batch` at a time, to the device as arguments of a kernel.
template <class Batch, int batch_size, class Item, class Run>
void upload(const std::vector<Item>& items, const Run& run) {
  for (size_t i = 0; i < items.size(); i += batch_size) {
    Batch batch = {};
    const size_t count = std::min<size_t>(batch_size, items.size() - i);
    std::copy_n(items.begin() + static_cast<int64_t>(i), count, reinterpret_cast<Item*>(&batch));
    run(batch, static_cast<int>(count), i);
  }
}

template <class LayOut>
void step(std::vector<HostParameter>& parameters, const Settings& s, const Tensor& any,
          bool factored, const LayOut& lay_out) {
  int64_t param_bytes = 0;
  for (const HostParameter& h : parameters) {
    param_bytes += h.parameter.numel() * (h.parameter.param.dtype == kFloat32 ? 4 : 2);
  }
  // Of the promise "0.5 % of the parameters and 8 MB" (parameters themselves are described in it).
  const int64_t limit = (int64_t{6} << 20) + param_bytes / 250;
  const std::vector<Group> groups =
      group(parameters, factored, s.cautious, tuning_of(any), limit, lay_out);
  if (groups.empty()) return;

  // Descriptions of all parameters in the order of the groups; work arrays of one group at a time.
  std::vector<Strides> strides;
  int64_t count = 0, work = 0;
  for (const Group& g : groups) {
    Arena arena(nullptr);
    for (size_t i : g.members) {
      HostParameter& h = parameters[i];
      lay_out(h.parameter, g.kind.access, s.cautious, arena);
      if (h.param_strides.dims != 0) strides.push_back(h.param_strides);
      if (h.grad_strides.dims != 0) strides.push_back(h.grad_strides);
    }
    count += static_cast<int64_t>(g.members.size());
    work = std::max(work, arena.used());
  }
  const auto reserve = [&](Arena& arena) {
    return std::make_tuple(arena.take<Parameter>(count), arena.take<Scalars>(count),
                           arena.take<Strides>(static_cast<int64_t>(strides.size())),
                           arena.take<char>(work));
  };
  Arena measure(nullptr);
  reserve(measure);
  const Tensor memory = torch::stable::new_empty(any, {measure.used()}, ScalarType::Byte);
  Arena arena(static_cast<char*>(memory.data_ptr()));
  auto [on_device, scalars, strides_on_device, work_memory] = reserve(arena);

  const DeviceGuard guard(any);
  const cudaStream_t stream = current_stream(any);
  std::vector<Parameter> described;
  std::vector<Launches> launches;
  const Strides* next_strides = strides_on_device;
  for (const Group& g : groups) {
    Launches l = {on_device + described.size(), static_cast<int>(g.members.size()), {}, stream};
    Arena pieces(work_memory);
    for (size_t i : g.members) {
      HostParameter& h = parameters[i];
      Parameter& p = h.parameter;
      lay_out(p, g.kind.access, s.cautious, pieces);
      if (h.param_strides.dims != 0) p.param.strides = next_strides++;
      if (h.grad_strides.dims != 0) p.grad.strides = next_strides++;
      p.scalars = scalars + described.size();
      count_blocks(p, factored, g.kind.access, l.blocks);
      described.push_back(p);
    }
    launches.push_back(l);
  }
  upload<StridesBatch, kStridesBatch>(
      strides, [&, out = strides_on_device](const StridesBatch& batch, int size, size_t first) {
        launch(describe_strides, 1, kThreads, stream, batch, size, out + first);
      });
  upload<ParameterBatch, kBatch>(
      described, [&, out = on_device](const ParameterBatch& batch, int size, size_t first) {
        launch(describe, 1, kThreads, stream, batch, size, s, out + first);
      });
  for (size_t i = 0; i < groups.size(); ++i) {
    factored ? run_factored(groups[i].kind, launches[i], s)
             : run_flat(groups[i].kind, launches[i], s);
  }
}

int64_t from_environment(const char* name, int64_t fallback) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return fallback;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  STD_TORCH_CHECK(*end == '\0' && value >= 0, name, "=", text, ": expected a number of at least 0");
  return value;
}

// Bytes per second of the memory, or 0 where the driver does not say.
double memory_bandwidth() {
#if defined(CAME8BIT_SHIM)
  return 0.0;
#else
  int device = 0, kilohertz = 0, bits = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0.0;
  }
  return 2.0 * 1000.0 * kilohertz * bits / 8;
#endif
}

}  // namespace

Tuning tuning_of(const Tensor& any) {
  const DeviceGuard guard(any);
  // Gradients and codes that stay in the cache save 5 of 13 bytes, but every group costs launches:
  // worth it where the cache is large for the memory's speed (docs/performance.md).
  constexpr double kSecondsPerGroup = 20e-6;
  const int64_t half_l2 = device_properties(any).l2_bytes / 2;
  const double bandwidth = memory_bandwidth();
  const bool by_cache =
      bandwidth == 0.0 || static_cast<double>(half_l2) * (5.0 / 3.0) / bandwidth > kSecondsPerGroup;
  Tuning tuning = {};
  tuning.group_bytes =
      from_environment("CAME8BIT_CUDA_GROUP_BYTES", by_cache ? half_l2 : INT64_MAX / 2);
  tuning.small_elements = from_environment("CAME8BIT_CUDA_SMALL_ELEMENTS", 1 << 16);
  return tuning;
}

void factored_step(std::vector<HostParameter>& parameters, const Settings& settings,
                   const Tensor& any) {
  for (HostParameter& h : parameters) {
    Parameter& p = h.parameter;
    p.grid = Grid::of(p.b, p.n, p.k);
    p.whole_blocks = p.slice_len == p.k || p.k % kBlockSize == 0 ? 1 : 0;
  }
  step(parameters, settings, any, true, lay_out_factored);
}

void unfactored_step(std::vector<HostParameter>& parameters, const Settings& settings,
                     const Tensor& any) {
  for (HostParameter& h : parameters) {
    if (h.is8bit) continue;  // without codes any cut into blocks will do
    h.parameter.slices = 1;
    h.parameter.slice_len = h.parameter.numel();
    h.parameter.blocks_per_slice = (h.parameter.slice_len + kBlockSize - 1) / kBlockSize;
  }
  step(parameters, settings, any, false, lay_out_flat);
}

}  // namespace came8bit
