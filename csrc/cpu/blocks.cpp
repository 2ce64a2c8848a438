#include "blocks.h"

#include <algorithm>

#include "parallel.h"

namespace came8bit {
namespace {

// What a piece needs beside the tensors; the parameter and the gradient where they are strided.
struct Buffers {
  alignas(64) float momentum[kPiece];
  alignas(64) float w[kPiece];
  alignas(64) float kept[kPiece];  // of coarse codes
  alignas(64) float step[kBlockSize];
  alignas(64) uint16_t random[kPiece + kDraw];
  alignas(64) float param[kPiece];
  alignas(64) char grad[kPiece * sizeof(float)];
  alignas(64) float largest[kBlocksPerTask + kLanes];  // of blocks
  bool decays[kBlocksPerTask];

  ToEncode to_encode(int blocks) {
    std::fill_n(largest, blocks, 0.0f);
    std::fill_n(decays, blocks, false);
    return {largest, decays};
  }
};

// Neighbouring blocks that go through the passes together.
struct Piece {
  int64_t block, first;  // numbers of its first block and its first element
  int size, block_size;

  int blocks() const { return (size + block_size - 1) / block_size; }
};

// With `together`, as many blocks as fit: of one slice, or of slices that are blocks.
template <class Run>
void for_each_piece(const Blocks& blocks, bool together, int64_t task, const Run& run) {
  const int64_t begin = task * kBlocksPerTask;
  const int64_t end = std::min(begin + kBlocksPerTask, blocks.count());
  const int64_t block_size = std::min(blocks.size, blocks.slice_len);
  const int64_t most_blocks = together ? kPiece / block_size : 1;
  // Divisions once a task, not once a piece.
  int64_t slice = begin / blocks.per_slice, in_slice = begin % blocks.per_slice;
  for (int64_t block = begin; block < end;) {
    int64_t count = std::min(most_blocks, end - block), size = count * block_size;
    const int64_t first = slice * blocks.slice_len + in_slice * block_size;
    if (blocks.per_slice == 1) {
      slice += count;
    } else {
      count = std::min(count, blocks.per_slice - in_slice);
      size = std::min(count * block_size, blocks.slice_len - in_slice * block_size);
      in_slice += count;
      if (in_slice == blocks.per_slice) {
        in_slice = 0;
        ++slice;
      }
    }
    run(Piece{block, first, static_cast<int>(size), static_cast<int>(block_size)});
    block += count;
  }
}

// The pieces of a parameter: as much as fits where blocks begin with rows, else one block.
template <class Run>
void for_each_piece(const Parameter& p, int64_t task, const Run& run) {
  const Blocks blocks(p);
  const bool with_rows = blocks.slice_len == p.k || p.k % blocks.size == 0;
  for_each_piece(blocks, with_rows, task, run);
}

// Calls run(number of the block, its first element, offset in the piece, size).
template <class Run>
void for_each_block(const Piece& piece, const Run& run) {
  int64_t block = piece.block;
  for (int done = 0; done < piece.size; done += piece.block_size, ++block) {
    run(block, piece.first + done, done, std::min(piece.block_size, piece.size - done));
  }
}

// Cuts [begin, end) of a piece where rows end, unless they are blocks, and calls run(segment, first
// element, offset).
template <class Run>
void for_each_segment(const Parameter& p, const Factors& factors, Buffers& buffers,
                      const Piece& piece, int begin, int end, const Run& run) {
  const auto from = [](auto* x, int64_t i) { return x != nullptr ? x + i : nullptr; };
  int64_t row = (piece.first + begin) / p.k, column = (piece.first + begin) % p.k;
  for (int done = begin; done < end; column = 0) {
    const int64_t e = piece.first + done;
    const int64_t batch_column = (p.b == 1 ? 0 : row / p.n * p.k) + column;
    Segment s;  // not zeroed first, which would take as long as a kernel's start
    s.size = static_cast<int>(std::min<int64_t>(p.k - column, end - done));
    s.rows = 1;
    if (piece.block_size == p.k) {
      s.rows = static_cast<int>(std::min<int64_t>((end - done) / p.k, p.n - row % p.n));
    }
    s.block_size = piece.block_size;
    s.param = nullptr;
    s.grad = p.grad.contiguous() ? p.grad.at(e) : buffers.grad + done * p.grad.itemsize();
    s.row_gain = from(factors.row_gain, row);
    s.col_factor = from(factors.col, batch_column);
    s.update_row = from(factors.update_row, row);
    s.update_col = from(factors.update_col, batch_column);
    s.exp_avg_sq = from(p.exp_avg_sq, e);
    s.new_exp_avg_sq = nullptr;
    s.old_exp_avg = nullptr;
    s.scales = nullptr;
    s.decay = 1.0f;
    s.exp_avg = buffers.momentum + done;
    s.w = buffers.w + done;
    s.kept = nullptr;
    s.random = nullptr;
    run(s, e, done);
    done += s.rows * s.size;
    row += s.rows;
  }
}
template <class Run>
void for_each_segment(const Parameter& p, const Factors& factors, Buffers& buffers,
                      const Piece& piece, const Run& run) {
  for_each_segment(p, factors, buffers, piece, 0, piece.size, run);
}

// --- passes over a piece ----------------------------------------------------------------------

// Gives the kernel of an update the parameter.
template <class Run>
void with_param(const Parameter& p, Segment& s, int64_t e, Buffers& buffers, const Run& run) {
  s.param = p.param.read(e, s.rows * s.size, buffers.param);
  run();
  p.param.write(e, s.rows * s.size, s.param);
}

// The kernel that makes the new momentum and the update at once; null where these are two passes.
Kernels::Momentum update_at_once(const Parameter& p, const StepConstants& constants) {
  const bool fp32 = p.param_dtype == kFloat32 && p.grad_dtype == kFloat32;
  if (!fp32 || p.exp_avg_sq != nullptr || p.coarse() || constants.cautious) return nullptr;
  return p.bits == 8 ? kernels().update8 : kernels().update32;
}

// Makes w and the new momentum, in `buffers`; with `stores`, momentum and second moment that are
// not coded go where they belong. `at_once` may update the parameter, too.
void new_momentum(const Parameter& p, const StepConstants& constants, const Factors& factors,
                  const Piece& piece, bool stores, Kernels::Momentum at_once, Buffers& buffers,
                  ToEncode blocks) {
  const Kernels& table = kernels();
  const bool coded = Blocks::coded(p), full = p.exp_avg_sq != nullptr;
  const bool packed = p.coarse() && !full && codes_begin_with_rows(p);
  const bool decoded = p.coarse() && !packed;
  const Kernels::Momentum momentum =
      (decoded  ? (full ? table.momentum_decoded_unfactored : table.momentum_decoded)
       : packed ? (p.bits == 4 ? table.momentum4 : table.momentum2)
       : coded  ? (full ? table.momentum8_unfactored : table.momentum8)
                : (full ? table.momentum32_unfactored : table.momentum32))[p.grad_dtype];
  if (decoded) {
    for_each_block(piece, [&](int64_t block, int64_t first, int done, int size) {
      coarse_code(p).decode(packed_codes(p, first), 0, scales_of(p, block), constants.beta1, size,
                            buffers.momentum + done);
    });
  }
  for_each_segment(p, factors, buffers, piece, [&](Segment& s, int64_t e, int done) {
    const int64_t block = done / piece.block_size;
    s.grad = p.grad.read(e, s.rows * s.size, buffers.grad + done * p.grad.itemsize());
    if (!decoded) s.decay = constants.beta1;
    if (decoded) {
      s.old_exp_avg = s.exp_avg;
    } else if (packed) {
      s.old_exp_avg = packed_codes(p, e);
      s.scales = scales_of(p, piece.block + block);
    } else if (coded) {
      s.old_exp_avg = static_cast<const int8_t*>(p.exp_avg) + e;
      s.scales = p.absmax + piece.block + block;
    } else {
      s.old_exp_avg = static_cast<float*>(p.exp_avg) + e;
      if (stores) s.exp_avg = static_cast<float*>(p.exp_avg) + e;
    }
    if (stores && full) s.new_exp_avg_sq = p.exp_avg_sq + e;
    const ToEncode of_segment = blocks.from(block);
    if (at_once == nullptr) return momentum(constants, s, of_segment);
    with_param(p, s, e, buffers, [&] { at_once(constants, s, of_segment); });
  });
}

// Codes the new momentum, and fills `buffers` with what the codes hold of it.
void encode_coarse(const Parameter& p, const Factors& factors, const Piece& piece, ToEncode blocks,
                   Buffers& buffers) {
  const Kernels& table = kernels();
  const CoarseCode& code = coarse_code(p);
  const int all = piece.blocks(), block_size = piece.block_size;
  const auto encode = [&](const float* x, int i, int count, int size) {
    code.encode(x + i * block_size, blocks.largest + i, count, size,
                packed_codes(p, piece.first + i * block_size), scales_of(p, piece.block + i),
                buffers.kept + i * block_size);
  };
  for (int i = 0; i < all;) {
    const int done = i * block_size, size = std::min(block_size, piece.size - done);
    if (size <= kLanes) {
      const int together = code.encode_rows(buffers.momentum + done, blocks.from(i), all - i, size,
                                            packed_codes(p, piece.first + done),
                                            scales_of(p, piece.block + i), buffers.kept + done);
      i += together;
      if (together > 0) continue;
    }
    if (blocks.decays[i]) {
      for_each_segment(
          p, factors, buffers, piece, done, done + size,
          [&](Segment& s, int64_t, int at) { table.forget[p.grad_dtype](s, buffers.kept + at); });
      blocks.largest[i] = table.largest_magnitude(buffers.kept + done, size);
      encode(buffers.kept, i, 1, size);
      ++i;
      continue;
    }
    int count = 1;
    if (size == kCoarseBlock) {
      const int full = std::min(piece.size / kCoarseBlock, all);
      while (i + count < full && !blocks.decays[i + count]) ++count;
    }
    encode(buffers.momentum, i, count, size);
    i += count;
  }
}

void encode(const Parameter& p, const Factors& factors, const Piece& piece, ToEncode blocks,
            Buffers& buffers) {
  const Kernels& table = kernels();
  for (int i = 0; i < piece.blocks();) {
    const int done = i * piece.block_size, size = std::min(piece.block_size, piece.size - done);
    const float* x = buffers.momentum + done;
    int8_t* codes = static_cast<int8_t*>(p.exp_avg) + piece.first + done;
    float* absmax = p.absmax + piece.block + i;
    const int together = size <= kLanes ? table.encode_rows(x, blocks.from(i), piece.blocks() - i,
                                                            size, codes, absmax)
                                        : 0;
    i += together;
    if (together > 0) continue;
    if (blocks.decays[i]) {
      for_each_segment(p, factors, buffers, piece, done, done + size,
                       [&](Segment& s, int64_t, int at) {
                         table.steps[p.grad_dtype](s, buffers.step + at - done);
                       });
    }
    const float* step = blocks.decays[i] ? buffers.step : nullptr;
    *absmax = table.encode(x, step, blocks.largest[i], size, codes);
    ++i;
  }
}

}  // namespace

void apply_blocks(const Parameter& p, const StepConstants& constants, const Factors& factors,
                  int64_t task) {
  const Kernels& table = kernels();
  const auto apply = (p.exp_avg_sq ? table.apply_unfactored : table.apply)[p.param_dtype];
  const Kernels::Momentum at_once = update_at_once(p, constants);
  const bool draws = constants.stochastic && p.param_dtype != kFloat32;
  Buffers buffers;
  for_each_piece(p, task, [&](const Piece& piece) {
    const uint64_t element = p.offset + static_cast<uint64_t>(piece.first);
    const uint16_t* random =
        draws ? table.random_bits(constants, element, piece.size, buffers.random) : nullptr;
    const ToEncode blocks = buffers.to_encode(piece.blocks());
    new_momentum(p, constants, factors, piece, true, at_once, buffers, blocks);
    // The update spends what a coarse code forgets.
    if (p.coarse()) encode_coarse(p, factors, piece, blocks, buffers);
    if (at_once == nullptr) {
      for_each_segment(p, factors, buffers, piece, [&](Segment& s, int64_t e, int done) {
        if (!Blocks::coded(p)) s.exp_avg = static_cast<float*>(p.exp_avg) + e;
        s.kept = p.coarse() ? buffers.kept + done : nullptr;
        s.random = random ? random + done : nullptr;
        with_param(p, s, e, buffers, [&] { apply(constants, s); });
      });
    }
    if (p.bits == 8) encode(p, factors, piece, blocks, buffers);
  });
}

int64_t count_agreeing(const Parameter& p, const StepConstants& constants, const Factors& factors,
                       int64_t task) {
  Buffers buffers;
  int64_t total = 0;
  for_each_piece(p, task, [&](const Piece& piece) {
    const ToEncode blocks = buffers.to_encode(piece.blocks());
    new_momentum(p, constants, factors, piece, false, nullptr, buffers, blocks);
    total += kernels().agreeing(buffers.w, buffers.momentum, piece.size);
  });
  return total;
}

void quantize(const float* x, int64_t slices, int64_t slice_len, int8_t* codes, float* absmax) {
  const Blocks blocks(slices, slice_len, kBlockSize);
  const Kernels& table = kernels();
  for_each_task(blocks.tasks(), thread_count(), [&](int64_t task, int64_t) {
    for_each_piece(blocks, false, task, [&](const Piece& piece) {
      const float* values = x + piece.first;
      const float largest = table.largest_magnitude(values, piece.size);
      absmax[piece.block] = table.encode(values, nullptr, largest, piece.size, codes + piece.first);
    });
  });
}

void dequantize(const int8_t* codes, const float* absmax, int64_t slices, int64_t slice_len,
                float* x) {
  const Blocks blocks(slices, slice_len, kBlockSize);
  const auto decode = kernels().decode;
  for_each_task(blocks.tasks(), thread_count(), [&](int64_t task, int64_t) {
    for_each_piece(blocks, false, task, [&](const Piece& piece) {
      decode(codes + piece.first, absmax[piece.block], piece.size, x + piece.first);
    });
  });
}

}  // namespace came8bit
