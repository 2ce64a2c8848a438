// Queues the launches of a step.
#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>

#include "groups.h"
#include "kernels.cuh"

namespace came8bit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- launches ---------------------------------------------------------------------------------

template <class T>
struct Type {
  using type = T;
};

#if defined(CAME8BIT_FEW_TYPES)
constexpr bool kFewTypes = true;  // fp16 has no kernels of its own
#else
constexpr bool kFewTypes = false;
#endif

// Calls call(Type<T>()) with the type that `type` names; without `any` there is always one. Coarse
// momentum has kernels for bf16, and others for any type.
template <bool any, bool coarse = false, class Call>
void with_type(int type, const Call& call) {
  if (type == kBfloat16) return call(Type<Bf16>());
  if constexpr (!coarse) {
    if (type == kFloat32) return call(Type<float>());
  }
  if constexpr (!coarse && !kFewTypes) {
    if (type == kFloat16) return call(Type<Half>());
  }
  if constexpr (any || coarse || kFewTypes) call(Type<Any>());
}

template <class Call>
void with_momentum(int bits, const Call& call) {
  switch (bits) {
    case 2:
      return call(Type<Bits2>());
    case 4:
      return call(Type<Bits4>());
    case 8:
      return call(Type<int8_t>());
    default:
      return call(Type<float>());
  }
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
void run_factored(const Kind& kind, const Launches& l, const StepSettings& s) {
  constexpr bool fast = access != kOneByOne;
  // Types are known in the fast kernels only.
  const auto with_grad = [&](auto coarse, const auto& call) {
    if constexpr (fast) {
      with_type<false, decltype(coarse)::value>(kind.grad_type, call);
    } else {
      call(Type<Any>());
    }
  };
  with_grad(std::false_type(), [&](auto g) {
    using G = typename decltype(g)::type;
    l.run(second_moment_kernel<G, fast>, l.blocks[kSweepA], l.count);
  });
  l.run(second_moment_combine_kernel, l.blocks[kCombine], l.count, s);
  l.run(second_moment_scalars_kernel, l.count, s);
  with_grad(std::bool_constant<kCoarse<M>>(), [&](auto g) {
    using G = typename decltype(g)::type;
    l.run(instability_kernel<G, M, fast>, l.blocks[kSweepA], l.count, s);
  });
  l.run(instability_combine_kernel, l.blocks[kCombine], l.count, s);
  if (s.cautious) l.run(agreeing_kernel<M, access>, l.blocks[kSweepC], l.count, s);
  l.run(update_rows_kernel, l.blocks[kRows], l.count, s, access);
  if constexpr (access == kTiles) {
    with_type<true, kCoarse<M>>(kind.param_type, [&](auto t) {
      using T = typename decltype(t)::type;
      l.run(apply_kernel<T, T, M, access>, l.blocks[kSweepC], l.count, s);
    });
  } else {
    l.run(apply_kernel<Any, Any, M, access>, l.blocks[kSweepC], l.count, s);
  }
}

void run_factored(const Kind& kind, const Launches& l, const StepSettings& s) {
  with_momentum(kind.bits, [&](auto m) {
    using M = typename decltype(m)::type;
    if (kind.small) return l.run(small_factored_kernel<M>, l.count, s);
    if (kind.access == kTiles) return run_factored<M, kTiles>(kind, l, s);
    if (kind.access == kOneByOne) return run_factored<M, kOneByOne>(kind, l, s);
    if constexpr (sizeof(M) == 1) run_factored<M, kBlocks>(kind, l, s);
  });
}

template <class M, bool fast>
void run_flat(const Launches& l, const StepSettings& s) {
  l.run(flat_sum_kernel<fast, false>, l.blocks[kSweepA], l.count, s);
  l.run(flat_sum_kernel<fast, true>, l.blocks[kSweepA], l.count, s);
  if (s.cautious) l.run(flat_agreeing_kernel<M, fast>, l.blocks[kSweepC], l.count, s);
  l.run(flat_apply_kernel<M, fast>, l.blocks[kSweepC], l.count, s);
}

void run_flat(const Kind& kind, const Launches& l, const StepSettings& s) {
  if (kind.small) return l.run(small_flat_kernel, l.count, s);
  with_momentum(kind.bits, [&](auto m) {
    using M = typename decltype(m)::type;
    if constexpr (!kCoarse<M>) {
      if (kind.access == kTiles) return run_flat<M, true>(l, s);
    }
    run_flat<M, false>(l, s);
  });
}

void count_blocks(Parameter& p, bool factored, Access access, int64_t* blocks) {
  for (int phase = 0; phase < kPhases; ++phase) p.first[phase] = blocks[phase];
  if (factored) {
    blocks[kSweepA] += p.tiles();
    blocks[kCombine] += p.combine_tasks();
    blocks[kRows] += p.b * ((p.n + kThreads - 1) / kThreads);
    blocks[kSweepC] += apply_tasks(p, access);
  } else {
    blocks[kSweepA] += flat_tiles(p);
    blocks[kSweepC] += flat_apply_tasks(p);
  }
}

// Copies the items from `first` on to the device as arguments of a kernel; returns how many.
template <int bytes, class Item, class Run>
size_t upload_batch(const std::vector<Item>& items, size_t first, const Run& run) {
  Batch<Item, bytes> batch = {};
  const size_t count = std::min<size_t>(batch.kSize, items.size() - first);
  std::copy_n(items.begin() + static_cast<int64_t>(first), count, batch.items);
  run(batch, static_cast<int>(count), first);
  return count;
}

// All of them; few need no large arguments.
template <class Item, class Run>
void upload(const std::vector<Item>& items, bool large_arguments, const Run& run) {
  for (size_t i = 0; i < items.size();) {
    const bool many = items.size() - i > Batch<Item, kSmallBatchBytes>::kSize;
    i += many && large_arguments ? upload_batch<kLargeBatchBytes>(items, i, run)
                                 : upload_batch<kSmallBatchBytes>(items, i, run);
  }
}

template <class LayOut>
void step(std::vector<HostParameter>& parameters, const StepSettings& s, const Tensor& any,
          bool factored, const LayOut& lay_out) {
  int64_t param_bytes = 0;
  for (const HostParameter& h : parameters) {
    param_bytes += h.parameter.numel() * (h.parameter.param.dtype == kFloat32 ? 4 : 2);
  }
  // Of the promise "0.5 % of the parameters and 8 MB" (parameters themselves are described in it).
  const int64_t limit = (int64_t{6} << 20) + param_bytes / 250;
  const Tuning tuning = tuning_of(any);
  const std::vector<Group> groups = group(parameters, factored, s.cautious, tuning, limit, lay_out);
  if (groups.empty()) return;

  // Descriptions of all parameters in the order of the groups; work arrays of one group at a time.
  std::vector<Strides> strides;
  int64_t count = 0, work = 0;
  for (const Group& g : groups) {
    for (size_t i : g.members) {
      const HostParameter& h = parameters[i];
      if (h.param_strides.dims != 0) strides.push_back(h.param_strides);
      if (h.grad_strides.dims != 0) strides.push_back(h.grad_strides);
    }
    count += static_cast<int64_t>(g.members.size());
    work = std::max(work, g.workspace);
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
    const int rounds = factored ? rounds_of(parameters, g, tuning.apply_rounds) : kFewestRounds;
    for (size_t i : g.members) {
      HostParameter& h = parameters[i];
      Parameter& p = h.parameter;
      p.apply_rounds = rounds;
      lay_out(p, g.kind.access, s.cautious, pieces);
      if (h.param_strides.dims != 0) p.param.strides = next_strides++;
      if (h.grad_strides.dims != 0) p.grad.strides = next_strides++;
      p.scalars = scalars + described.size();
      count_blocks(p, factored, g.kind.access, l.blocks);
      described.push_back(p);
    }
    launches.push_back(l);
  }
  const bool large = device_properties(any).large_arguments;
  upload(strides, large, [&, out = strides_on_device](const auto& batch, int size, size_t first) {
    launch(describe_strides<std::decay_t<decltype(batch)>>, 1, kThreads, stream, batch, size,
           out + first);
  });
  upload(described, large, [&, out = on_device](const auto& batch, int size, size_t first) {
    launch(describe<std::decay_t<decltype(batch)>>, 1, kThreads, stream, batch, size, s,
           out + first);
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

}  // namespace

Tuning tuning_of(const Tensor& any) {
  // Gradients and codes that stay in the cache save 5 of 13 bytes, but every group costs launches:
  // worth it where the cache is large for the memory's speed (docs/internals/kernels.md).
  constexpr double kSecondsPerGroup = 20e-6;
  const DeviceProperties device = device_properties(any);
  const int64_t half_l2 = device.l2_bytes / 2;
  const bool by_cache =
      static_cast<double>(half_l2) * (5.0 / 3.0) >= kSecondsPerGroup * device.bytes_per_second;
  Tuning tuning = {};
  tuning.group_bytes =
      from_environment("CAME8BIT_CUDA_GROUP_BYTES", by_cache ? half_l2 : INT64_MAX / 2);
  tuning.small_elements = from_environment("CAME8BIT_CUDA_SMALL_ELEMENTS", 1 << 16);
  const int64_t rounds = from_environment("CAME8BIT_CUDA_APPLY_ROUNDS", 0);
  STD_TORCH_CHECK(rounds == 0 || (rounds >= kFewestRounds && rounds <= 1024),
                  "CAME8BIT_CUDA_APPLY_ROUNDS=", rounds, ": expected 0 or ", kFewestRounds,
                  " to 1024");
  tuning.apply_rounds = static_cast<int>(rounds);
  return tuning;
}

void factored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                   const Tensor& any) {
  for (HostParameter& h : parameters) {
    Parameter& p = h.parameter;
    p.grid = Grid::of(p.b, p.n, p.k);
    p.apply_rounds = kFewestRounds;
    const int64_t block_size = h.bits < 8 ? kCoarseBlock : kBlockSize;
    p.whole_blocks = p.slice_len == p.k || p.k % block_size == 0 ? 1 : 0;
  }
  step(parameters, settings, any, true, lay_out_factored);
}

void unfactored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                     const Tensor& any) {
  for (HostParameter& h : parameters) {
    if (h.bits < 32) continue;  // without codes any cut into blocks will do
    h.parameter.slices = 1;
    h.parameter.slice_len = h.parameter.numel();
    h.parameter.blocks_per_slice = (h.parameter.slice_len + kBlockSize - 1) / kBlockSize;
  }
  step(parameters, settings, any, false, lay_out_flat);
}

}  // namespace came8bit
