#include "blocks.h"

#include <algorithm>

#include "parallel.h"

namespace came8bit {
namespace {

// What one block needs beside the tensors; the parameter and the gradient where they are strided.
struct Buffers {
  alignas(64) float momentum[kBlockSize];
  alignas(64) float step[kBlockSize];  // coarse codes: w
  alignas(64) float kept[kCoarseBlock];
  alignas(64) uint16_t random[kBlockSize + kDraw];
  alignas(64) float param[kBlockSize];
  alignas(64) float grad[kBlockSize];
};

// A block whose new momentum is in `buffers` and not yet stored.
struct Pending {
  Buffers* buffers;
  int64_t block, first;
  int size;
  Applied applied;
};

// Cuts a block where rows end and calls run(segment, first element, offset in the block).
template <class Run>
void for_each_segment(const Parameter& p, const Factors& factors, Buffers& buffers, int64_t first,
                      int size, const Run& run) {
  for (int done = 0; done < size;) {
    const int64_t e = first + done;
    const int64_t row = e / p.k, column = e - row * p.k;
    Segment s = {};
    s.size = static_cast<int>(p.k - column < size - done ? p.k - column : size - done);
    s.grad = p.grad.read(e, s.size, buffers.grad);
    if (factors.row_gain != nullptr) {
      const int64_t batch_column = (p.b == 1 ? 0 : row / p.n * p.k) + column;
      s.row_gain = factors.row_gain[row];
      s.col_factor = factors.col + batch_column;
      s.update_row = factors.update_row ? factors.update_row[row] : 0.0f;
      s.update_col = factors.update_col ? factors.update_col + batch_column : nullptr;
    } else {
      s.exp_avg_sq = p.exp_avg_sq + e;
    }
    if (p.absmax != nullptr) {
      s.codes = static_cast<const int8_t*>(p.exp_avg) + e;
      s.exp_avg = buffers.momentum + done;
    } else if (p.scales != nullptr) {
      s.exp_avg = buffers.momentum + done;
    } else {
      s.exp_avg = static_cast<float*>(p.exp_avg) + e;
    }
    run(s, e, done);
    done += s.size;
  }
}

template <class Run>
void for_each_block(const Blocks& blocks, int64_t task, const Run& run) {
  const int64_t begin = task * kBlocksPerTask;
  const int64_t end =
      begin + kBlocksPerTask < blocks.count() ? begin + kBlocksPerTask : blocks.count();
  // Divisions once a task, not once a block.
  int64_t slice = begin / blocks.per_slice, in_slice = begin % blocks.per_slice;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t done = in_slice * blocks.size;
    const int64_t rest = blocks.slice_len - done;
    run(block, slice * blocks.slice_len + done,
        static_cast<int>(rest < blocks.size ? rest : blocks.size));
    if (++in_slice == blocks.per_slice) {
      in_slice = 0;
      ++slice;
    }
  }
}

// --- coarse codes -----------------------------------------------------------------------------

// Fills `buffers` with w and the new momentum of a block; returns the largest to be encoded.
float coarse_momentum_of_block(const Parameter& p, const StepConstants& constants,
                               const Factors& factors, Buffers& buffers, int64_t block,
                               int64_t first, int size) {
  const Kernels& table = kernels();
  const auto momentum =
      (p.exp_avg_sq ? table.coarse_momentum_unfactored : table.coarse_momentum)[p.grad_dtype];
  coarse_code(p).decode(packed_codes(p, first), 0, scales_of(p, block), constants.beta1, size,
                        buffers.momentum);
  float largest = 0.0f;
  for_each_segment(p, factors, buffers, first, size, [&](Segment& s, int64_t, int done) {
    largest = std::max(largest, momentum(constants, {s, buffers.step + done, buffers.kept + done}));
  });
  return largest;
}

// A block is encoded before it is applied: the update needs to know what the code holds.
void apply_coarse_blocks(const Parameter& p, const StepConstants& constants, const Factors& factors,
                         int64_t task) {
  const Kernels& table = kernels();
  const auto apply = (p.exp_avg_sq ? table.coarse_apply_unfactored
                                   : table.coarse_apply)[p.param_dtype][p.grad_dtype];
  const bool draws = constants.stochastic && p.param_dtype != kFloat32;
  Buffers buffers;
  for_each_block(Blocks(p), task, [&](int64_t block, int64_t first, int size) {
    const float largest =
        coarse_momentum_of_block(p, constants, factors, buffers, block, first, size);
    coarse_code(p).encode(buffers.kept, largest, size, packed_codes(p, first), scales_of(p, block));
    const uint16_t* random =
        draws ? table.random_bits(constants, p.offset + static_cast<uint64_t>(first), size,
                                  buffers.random)
              : nullptr;
    for_each_segment(p, factors, buffers, first, size, [&](Segment& s, int64_t e, int done) {
      s.param = p.param.read(e, s.size, buffers.param);
      s.random = random ? random + done : nullptr;
      apply(constants, {s, buffers.step + done, buffers.kept + done});
      p.param.write(e, s.size, s.param);
    });
  });
}

}  // namespace

void apply_blocks(const Parameter& p, const StepConstants& constants, const Factors& factors,
                  int64_t task) {
  if (p.scales != nullptr) return apply_coarse_blocks(p, constants, factors, task);
  const Kernels& table = kernels();
  const auto& of_dtype = p.exp_avg_sq
                             ? (p.absmax ? table.apply8_unfactored : table.apply32_unfactored)
                             : (p.absmax ? table.apply8 : table.apply32);
  const auto apply = of_dtype[p.param_dtype][p.grad_dtype];
  const bool draws = constants.stochastic && p.param_dtype != kFloat32;
  // A block is encoded after the next one has been applied: the processor then has work while the
  // largest magnitude of the first is on its way to become a scale.
  Buffers both[2];
  Buffers* buffers = both;
  Pending pending = {};
  const auto encode_pending = [&] {
    if (pending.buffers == nullptr) return;
    p.absmax[pending.block] = table.encode(
        pending.buffers->momentum, pending.applied.decays ? pending.buffers->step : nullptr,
        pending.applied.largest, pending.size, static_cast<int8_t*>(p.exp_avg) + pending.first);
  };
  for_each_block(Blocks(p), task, [&](int64_t block, int64_t first, int size) {
    const uint16_t* random =
        draws ? table.random_bits(constants, p.offset + static_cast<uint64_t>(first), size,
                                  buffers->random)
              : nullptr;
    Applied block_applied = {};
    for_each_segment(p, factors, *buffers, first, size, [&](Segment& s, int64_t e, int done) {
      s.param = p.param.read(e, s.size, buffers->param);
      s.absmax = p.absmax ? p.absmax[block] * constants.beta1 : 0.0f;
      s.random = random ? random + done : nullptr;
      const Applied applied = apply(constants, s);
      block_applied.largest = std::max(block_applied.largest, applied.largest);
      block_applied.decays |= applied.decays;
      p.param.write(e, s.size, s.param);
    });
    if (p.absmax == nullptr) return;
    if (block_applied.decays) {
      for_each_segment(p, factors, *buffers, first, size, [&](Segment& s, int64_t, int done) {
        table.steps[p.grad_dtype](s, buffers->step + done);
      });
    }
    encode_pending();
    pending = {buffers, block, first, size, block_applied};
    buffers = buffers == both ? both + 1 : both;
  });
  encode_pending();
}

int64_t count_agreeing(const Parameter& p, const StepConstants& constants, const Factors& factors,
                       int64_t task) {
  const Kernels& table = kernels();
  const auto& of_dtype = p.exp_avg_sq
                             ? (p.absmax ? table.agreeing8_unfactored : table.agreeing32_unfactored)
                             : (p.absmax ? table.agreeing8 : table.agreeing32);
  const auto agreeing = of_dtype[p.grad_dtype];
  Buffers buffers;
  int64_t total = 0;
  for_each_block(Blocks(p), task, [&](int64_t block, int64_t first, int size) {
    if (p.scales != nullptr) {
      coarse_momentum_of_block(p, constants, factors, buffers, block, first, size);
      total += table.coarse_agreeing(buffers.step, buffers.momentum, size);
      return;
    }
    for_each_segment(p, factors, buffers, first, size, [&](Segment& s, int64_t, int) {
      s.absmax = p.absmax ? p.absmax[block] * constants.beta1 : 0.0f;
      total += agreeing(constants, s);
    });
  });
  return total;
}

void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax) {
  const Blocks blocks(slices, slice_len, kBlockSize);
  const Kernels& table = kernels();
  for_each_task(blocks.tasks(), thread_count(), [&](int64_t task, int64_t) {
    for_each_block(blocks, task, [&](int64_t block, int64_t first, int size) {
      const float largest = table.largest_magnitude(x + first, size);
      absmax[block] = table.encode(x + first, nullptr, largest, size, codes + first);
    });
  });
}

void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x) {
  const Blocks blocks(slices, slice_len, kBlockSize);
  const auto decode = kernels().decode;
  for_each_task(blocks.tasks(), thread_count(), [&](int64_t task, int64_t) {
    for_each_block(blocks, task, [&](int64_t block, int64_t first, int size) {
      decode(codes + first, absmax[block], size, x + first);
    });
  });
}

}  // namespace came8bit
