// Queues the launches of a step, or of one pass of it.
#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>

#include "launches.h"

namespace came8bit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void count_blocks(Parameter& p, bool factored, Access access, int64_t* blocks) {
  for (int phase = 0; phase < kPhases; ++phase) p.first[phase] = blocks[phase];
  if (factored) {
    blocks[kSweepA] += p.tiles();
    blocks[kCombine] += pass_tasks(p);
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

// Whether matrices or parameters with a full second moment, and their settings.
struct Step {
  bool factored;
  const StepSettings& s;
};

// What a whole step has the device do, as `queue` asks for it.
struct WholeStep : Step {
  using Item = Parameter;
  static constexpr bool empty_too = false;

  static Item item(const HostParameter& h) { return h.parameter; }
  void lay_out(HostParameter& h, Access access, Arena& arena) const {
    factored ? lay_out_factored(h.parameter, access, s.cautious, arena)
             : lay_out_flat(h.parameter, s.cautious, arena);
  }
  template <class ItemBatch>
  void describe(const ItemBatch& batch, int size, Parameter* out, cudaStream_t stream) const {
    launch(came8bit::describe<ItemBatch>, 1, kThreads, stream, batch, size, s, out);
  }
  void run(const Kind& kind, const Launches& launches) const {
    run_step(factored, kind, launches, s);
  }
};

// The same of one pass. Without rows here there is something to do, too.
struct OnePass : Step {
  Pass pass;

  using Item = PassParameter;
  static constexpr bool empty_too = true;

  static Item item(const HostParameter& h) { return {h.parameter, h.shared}; }
  void lay_out(HostParameter& h, Access access, Arena& arena) const {
    factored ? lay_out_pass(h.parameter, h.shared, pass, access, s.cautious, arena)
             : lay_out_flat_pass(h.parameter, pass, s.cautious, arena);
  }
  template <class ItemBatch>
  void describe(const ItemBatch& batch, int size, Parameter* out, cudaStream_t stream) const {
    launch(describe_pass<ItemBatch>, 1, kThreads, stream, batch, size, s, pass, out);
  }
  void run(const Kind& kind, const Launches& launches) const {
    run_pass(pass, factored, kind, launches, s);
  }
};

template <class Call>
void queue(std::vector<HostParameter>& parameters, const Call& call, const Tuning& tuning,
           const Tensor& any) {
  const bool factored = call.factored;
  int64_t param_bytes = 0;
  for (const HostParameter& h : parameters) {
    param_bytes += h.parameter.numel() * (h.parameter.param.dtype == kFloat32 ? 4 : 2);
  }
  // Of the promise "0.5 % of the parameters and 8 MB" (parameters themselves are described in it).
  const int64_t limit = (int64_t{6} << 20) + param_bytes / 250;
  const std::vector<Group> groups = group(parameters, call, tuning, limit);
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
  std::vector<typename Call::Item> described;
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
      call.lay_out(h, g.kind.access, pieces);
      if (h.param_strides.dims != 0) p.param.strides = next_strides++;
      if (h.grad_strides.dims != 0) p.grad.strides = next_strides++;
      p.scalars = scalars + described.size();
      count_blocks(p, factored, g.kind.access, l.blocks);
      described.push_back(Call::item(h));
    }
    launches.push_back(l);
  }
  const bool large = device_properties(any).large_arguments;
  upload(strides, large, [&, out = strides_on_device](const auto& batch, int size, size_t first) {
    launch(describe_strides<std::decay_t<decltype(batch)>>, 1, kThreads, stream, batch, size,
           out + first);
  });
  upload(described, large, [&, out = on_device](const auto& batch, int size, size_t first) {
    call.describe(batch, size, out + first, stream);
  });
  for (size_t i = 0; i < groups.size(); ++i) call.run(groups[i].kind, launches[i]);
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

namespace {

void divide_matrices(std::vector<HostParameter>& parameters) {
  for (HostParameter& h : parameters) {
    Parameter& p = h.parameter;
    p.grid = Grid::of(p.b, p.n, p.k);
    p.apply_rounds = kFewestRounds;
    const int64_t block_size = h.bits < 8 ? kCoarseBlock : kBlockSize;
    p.whole_blocks = p.slice_len == p.k || p.k % block_size == 0 ? 1 : 0;
  }
}

void divide_flat(std::vector<HostParameter>& parameters) {
  for (HostParameter& h : parameters) {
    if (h.bits < 32) continue;  // without codes any cut into blocks will do
    h.parameter.slices = 1;
    h.parameter.slice_len = h.parameter.numel();
    h.parameter.blocks_per_slice = (h.parameter.slice_len + kBlockSize - 1) / kBlockSize;
  }
}

// A pass reads a gradient once: nothing is gained by groups that fit the cache, nor by one block
// for a small parameter.
Tuning tuning_of_pass(const Tensor& any) {
  Tuning tuning = tuning_of(any);
  tuning.group_bytes = INT64_MAX / 2;
  tuning.small_elements = -1;
  return tuning;
}

}  // namespace

void factored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                   const Tensor& any) {
  divide_matrices(parameters);
  queue(parameters, WholeStep{{true, settings}}, tuning_of(any), any);
}

void unfactored_step(std::vector<HostParameter>& parameters, const StepSettings& settings,
                     const Tensor& any) {
  divide_flat(parameters);
  queue(parameters, WholeStep{{false, settings}}, tuning_of(any), any);
}

void factored_pass(Pass pass, std::vector<HostParameter>& parameters, const StepSettings& settings,
                   const Tensor& any) {
  divide_matrices(parameters);
  queue(parameters, OnePass{{true, settings}, pass}, tuning_of_pass(any), any);
}

void unfactored_pass(Pass pass, std::vector<HostParameter>& parameters,
                     const StepSettings& settings, const Tensor& any) {
  divide_flat(parameters);
  queue(parameters, OnePass{{false, settings}, pass}, tuning_of_pass(any), any);
}

}  // namespace came8bit
