// The launches of a group of parameters: of a whole step, and of each of its passes.
#pragma once

#include "groups.h"

namespace came8bit {

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
    case 0:
      return call(Type<Bits0>());
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
    if (blocks == 0) return;  // no rank but this one has rows
    STD_TORCH_CHECK(blocks <= INT32_MAX, "a group of parameters needs ", blocks,
                    " blocks, the device allows ", INT32_MAX, "; step fewer parameters at once");
    launch(kernel, static_cast<unsigned>(blocks), kThreads, stream, parameters, arguments...);
  }
};

// The sweeps over matrices.
template <class M, Access access>
struct Sweeps {
  const Kind& kind;
  const Launches& l;
  const StepSettings& s;

  static constexpr bool fast = access != kOneByOne;

  // Types are known in the fast kernels only.
  template <bool coarse, class Call>
  void with_grad(const Call& call) const {
    if constexpr (fast) {
      with_type<false, coarse>(kind.grad_type, call);
    } else {
      call(Type<Any>());
    }
  }

  void second_moment() const {
    with_grad<false>([&](auto g) {
      using G = typename decltype(g)::type;
      l.run(second_moment_kernel<G, fast>, l.blocks[kSweepA], l.count);
    });
  }

  void instability() const {
    with_grad<kCoarse<M>>([&](auto g) {
      using G = typename decltype(g)::type;
      l.run(instability_kernel<G, M, fast>, l.blocks[kSweepA], l.count, s);
    });
  }

  void agreeing() const {
    if (s.cautious) l.run(agreeing_kernel<M, access>, l.blocks[kSweepC], l.count, s);
  }

  void apply() const {
    if constexpr (access == kTiles) {
      with_type<true, kCoarse<M>>(kind.param_type, [&](auto t) {
        using T = typename decltype(t)::type;
        l.run(apply_kernel<T, T, M, access>, l.blocks[kSweepC], l.count, s);
      });
    } else {
      l.run(apply_kernel<Any, Any, M, access>, l.blocks[kSweepC], l.count, s);
    }
  }

  void step() const {
    second_moment();
    l.run(second_moment_combine_kernel, l.blocks[kCombine], l.count, s);
    l.run(second_moment_scalars_kernel, l.count, s);
    instability();
    l.run(instability_combine_kernel, l.blocks[kCombine], l.count, s);
    agreeing();
    l.run(update_rows_kernel, l.blocks[kRows], l.count, s, access);
    apply();
  }

  void pass(Pass pass) const {
    switch (pass) {
      case Pass::kSecondMoment:
        second_moment();
        l.run(pass_second_moment_kernel, l.blocks[kCombine], l.count, s);
        return l.run(pass_matrix_sums_kernel, l.count);
      case Pass::kInstability:
        l.run(pass_columns_kernel, l.blocks[kCombine], l.count, s);
        l.run(pass_prediction_kernel, l.count, s);
        instability();
        return l.run(pass_instability_kernel, l.blocks[kCombine], l.count, s);
      case Pass::kConfidence:
        l.run(pass_confidence_kernel, l.blocks[kCombine], l.count, s);
        agreeing();
        return l.run(pass_confidence_sums_kernel, l.count, s, access);
      case Pass::kApply:
        l.run(pass_update_rows_kernel, l.blocks[kRows], l.count);
        return apply();
    }
  }
};

// Calls call(sweeps) with those of the momentum and access of a group.
template <class Call>
void with_sweeps(const Kind& kind, const Launches& l, const StepSettings& s, const Call& call) {
  with_momentum(kind.bits, [&](auto m) {
    using M = typename decltype(m)::type;
    if (kind.access == kTiles) return call(Sweeps<M, kTiles>{kind, l, s});
    if (kind.access == kOneByOne) return call(Sweeps<M, kOneByOne>{kind, l, s});
    if constexpr (sizeof(M) == 1) call(Sweeps<M, kBlocks>{kind, l, s});
  });
}

// Those over parameters with a full second moment.
template <class M, bool fast>
struct FlatSweeps {
  const Launches& l;
  const StepSettings& s;

  void sum_g2() const { l.run(flat_sum_kernel<fast, false>, l.blocks[kSweepA], l.count, s); }
  void sum_u2() const { l.run(flat_sum_kernel<fast, true>, l.blocks[kSweepA], l.count, s); }
  void agreeing() const {
    if (s.cautious) l.run(flat_agreeing_kernel<M, fast>, l.blocks[kSweepC], l.count, s);
  }
  void apply() const { l.run(flat_apply_kernel<M, fast>, l.blocks[kSweepC], l.count, s); }

  void step() const {
    sum_g2();
    sum_u2();
    agreeing();
    apply();
  }

  void pass(Pass pass) const {
    switch (pass) {
      case Pass::kSecondMoment:
        sum_g2();
        return l.run(pass_flat_sums_kernel, l.count, false);
      case Pass::kInstability:
        sum_u2();
        return l.run(pass_flat_sums_kernel, l.count, true);
      case Pass::kConfidence:
        agreeing();
        return l.run(pass_confidence_sums_kernel, l.count, s, kOneByOne);
      case Pass::kApply:
        return apply();
    }
  }
};

template <class Call>
void with_flat_sweeps(const Kind& kind, const Launches& l, const StepSettings& s,
                      const Call& call) {
  with_momentum(kind.bits, [&](auto m) {
    using M = typename decltype(m)::type;
    if constexpr (!kCoarse<M>) {
      if (kind.access == kTiles) return call(FlatSweeps<M, true>{l, s});
    }
    call(FlatSweeps<M, false>{l, s});
  });
}

inline void run_step(bool factored, const Kind& kind, const Launches& l, const StepSettings& s) {
  const auto step = [](const auto& sweeps) { sweeps.step(); };
  if (!factored) {
    if (kind.small) return l.run(small_flat_kernel, l.count, s);
    return with_flat_sweeps(kind, l, s, step);
  }
  if (!kind.small) return with_sweeps(kind, l, s, step);
  with_momentum(kind.bits, [&](auto m) {
    l.run(small_factored_kernel<typename decltype(m)::type>, l.count, s);
  });
}

inline void run_pass(Pass pass, bool factored, const Kind& kind, const Launches& l,
                     const StepSettings& s) {
  const auto run = [pass](const auto& sweeps) { sweeps.pass(pass); };
  factored ? with_sweeps(kind, l, s, run) : with_flat_sweeps(kind, l, s, run);
}

}  // namespace came8bit
