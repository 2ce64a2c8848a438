// Which parameters are swept together, and where their work arrays are.
#pragma once

#include <map>
#include <tuple>

#include "passes.cuh"
#include "step.h"

namespace came8bit {

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

inline void lay_out_factored(Parameter& p, Access access, bool cautious, Arena& arena) {
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  p.row_part = arena.take<float>(3 * p.grid.parts * rows);
  p.col_part = arena.take<float>(3 * p.grid.slabs * cols);
  p.tile_sum = arena.take<float>(p.tile_sums());
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

inline void lay_out_flat(Parameter& p, bool cautious, Arena& arena) {
  p.tile_sum = arena.take<float>(2 * flat_tiles(p));
  p.agreeing = cautious ? arena.take<int>(flat_apply_tasks(p)) : nullptr;
}

// In a pass what stays is in `work`.
inline void lay_out_pass(Parameter& p, const SharedArguments& shared, Pass pass, Access access,
                         bool cautious, Arena& arena) {
  const int64_t rows = p.b * p.n, cols = p.b * p.k;
  const KeptArrays kept(p, shared.work);
  p.row_new = kept.row_new;
  p.col_new = kept.col_new;
  p.row_gain = kept.row_gain;
  p.col_factor = kept.col_factor;
  p.update_col = kept.col_sum;
  p.root_mean = kept.root_mean;
  if (pass == Pass::kSecondMoment || pass == Pass::kInstability) {
    const int64_t sums = pass == Pass::kSecondMoment ? 1 : 3;
    p.row_part = arena.take<float>(sums * p.grid.parts * rows);
    p.col_part = arena.take<float>(sums * p.grid.slabs * cols);
    p.col_chunk = arena.take<float>(p.b * p.col_chunks());
  }
  if (pass == Pass::kSecondMoment) {
    p.row_chunk = arena.take<float>(3 * p.b * p.row_chunks());
    p.total = arena.take<float>(p.b);
    p.predicted = arena.take<float>(p.b);
  } else if (pass == Pass::kInstability) {
    p.tile_sum = arena.take<float>(p.tile_sums());
    p.root_mean = arena.take<float>(p.b);
  } else if (pass == Pass::kConfidence) {
    p.row_chunk = arena.take<float>(p.b * p.row_chunks());
    p.agreeing = cautious ? arena.take<int>(apply_tasks(p, access)) : nullptr;
  } else {
    p.update_row = arena.take<float>(rows);
  }
}

inline void lay_out_flat_pass(Parameter& p, Pass pass, bool cautious, Arena& arena) {
  if (pass == Pass::kSecondMoment || pass == Pass::kInstability) {
    p.tile_sum = arena.take<float>(2 * flat_tiles(p));
  } else if (pass == Pass::kConfidence && cautious) {
    p.agreeing = arena.take<int>(flat_apply_tasks(p));
  }
}

// --- groups -----------------------------------------------------------------------------------

// Parameters of one kind run the same kernels.
struct Kind {
  bool small;
  int bits;
  Access access;
  int param_type, grad_type;  // kAnyType where kernels find out when running

  bool operator<(const Kind& other) const {
    return std::tie(small, access, bits, param_type, grad_type) <
           std::tie(other.small, other.access, other.bits, other.param_type, other.grad_type);
  }
};

// Parameters whose sweeps are launched together.
struct Group {
  Kind kind;
  std::vector<size_t> members;
  int64_t swept = 0;      // bytes of gradients and momentum
  int64_t workspace = 0;  // bytes
};

inline bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline Access access_of(const HostParameter& h, bool factored) {
  const Parameter& p = h.parameter;
  if (h.param_strides.dims != 0 || h.grad_strides.dims != 0) return kOneByOne;
  if (!aligned(p.param.data, 16) || !aligned(p.grad.data, 16) || !aligned(p.exp_avg, 16) ||
      !aligned(p.absmax, 4) || !aligned(h.shared.work, 16)) {
    return kOneByOne;
  }
  if (p.offset % kVector != 0) return kOneByOne;
  const bool vectors = h.bits == 32 || (h.bits == 8 && p.slice_len % kVector == 0);
  if (!factored) return vectors ? kTiles : kOneByOne;
  if (p.k % kVector != 0) return kOneByOne;
  if (h.bits == 32 || h.bits == 0 || p.whole_blocks) return kTiles;
  return h.bits == 8 ? kBlocks : kOneByOne;
}

inline Kind kind_of(const HostParameter& h, bool factored, const Tuning& tuning) {
  const Parameter& p = h.parameter;
  Kind kind = {};
  kind.access = access_of(h, factored);
  kind.bits = h.bits;
  kind.small =
      kind.access == kTiles && (factored || h.bits == 32) && p.numel() <= tuning.small_elements;
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

inline int64_t swept_bytes(const HostParameter& h) {
  const Parameter& p = h.parameter;
  return p.numel() * ((p.grad.dtype == kFloat32 ? 32 : 16) + h.bits) / 8;
}

// Rows that a thread handles in a tile of sweep C. A block has to find its parameter and its
// factors before it can begin: the more rows then the better, while there are enough blocks.
constexpr int kFewestRounds = 8;
inline int rounds_of(const std::vector<HostParameter>& parameters, const Group& g, int wished) {
  constexpr int64_t kEnoughBlocks = 4096;
  if (g.kind.access != kTiles || g.kind.small) return kFewestRounds;
  if (wished > 0) return wished;
  for (int rounds = 32; rounds > kFewestRounds; rounds /= 2) {
    int64_t blocks = 0;
    for (size_t i : g.members) {
      Parameter p = parameters[i].parameter;
      p.apply_rounds = rounds;
      blocks += apply_tasks(p, g.kind.access);
    }
    if (blocks >= kEnoughBlocks) return rounds;
  }
  return kFewestRounds;
}

// Fills groups in order: of one kind, within `tuning.group_bytes` and `limit` bytes of workspace,
// or of a single parameter. `call` is of step.cu.
template <class Call>
std::vector<Group> group(std::vector<HostParameter>& parameters, const Call& call,
                         const Tuning& tuning, int64_t limit) {
  std::map<Kind, Group> open;
  std::vector<Group> groups;
  for (size_t i = 0; i < parameters.size(); ++i) {
    HostParameter& h = parameters[i];
    if (h.parameter.numel() == 0 && !call.empty_too) continue;
    const Kind kind = kind_of(h, call.factored, tuning);
    Arena measure(nullptr);
    call.lay_out(h, kind.access, measure);
    const int64_t swept = swept_bytes(h);
    Group& g = open[kind];
    if (!g.members.empty() && ((!kind.small && g.swept + swept > tuning.group_bytes) ||
                               g.workspace + measure.used() > limit)) {
      groups.push_back(std::move(g));
      g = Group();
    }
    g.kind = kind;
    g.members.push_back(i);
    g.swept += swept;
    g.workspace += measure.used();
  }
  for (auto& entry : open) groups.push_back(std::move(entry.second));
  return groups;
}

}  // namespace came8bit
