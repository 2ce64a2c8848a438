// What the kernels know of a parameter: pointers, geometry, where its workspace is.
#pragma once

#include "../param_arguments.h"
#include "../quant.h"
#include "../step_settings.h"
#include "runtime.h"

namespace came8bit {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVector = 8;                            // elements a thread handles at once
constexpr int kCoarseLanes = kCoarseBlock / kVector;  // threads of a block of 4 or 2 bits
constexpr int kRoundVectors = kThreads * kVector;
constexpr int kMaxSlabRows = 2048;
constexpr int kMaxSpan = 16;
#if defined(CAME8BIT_SHIM)  // small parameters of tests are to reach them
constexpr int64_t kColumnPartBytes = 1000, kRowPartBytes = 2000;
#else
constexpr int64_t kColumnPartBytes = 2 << 20, kRowPartBytes = 6 << 20;
#endif
constexpr int kFlatRounds = 8;  // of a tile of a flat parameter
constexpr int64_t kFlatTile = int64_t{kRoundVectors} * kFlatRounds;
constexpr int kMaxDims = 6;                     // of a strided tensor, after neighbours are merged
constexpr uint32_t kBytePattern = 0x4b000000u;  // 2^23

// Phases whose blocks are shared out among the parameters of a group.
enum Phase : int { kSweepA, kCombine, kRows, kSweepC, kPhases };

// Sizes and strides of a tensor that is not contiguous, neighbouring dimensions merged.
struct Strides {
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];
};

// How eight neighbouring elements are reached, which decides what kernels run.
enum Access : int {
  kOneByOne,  // any layout
  kBlocks,    // as vectors; sweep C by blocks of the 8-bit code, which do not end where rows do
  kTiles,     // as vectors; sweep C by tiles: a row has whole blocks of its own
};

// A pointer to memory of the device. Kernels read it from shared memory, where the compiler would
// not know that it points to no shared or local memory.
template <class T>
struct Global {
  T* pointer;

  Global() = default;
  CAME8BIT_INLINE Global(T* to) : pointer(to) {}
  CAME8BIT_INLINE operator T*() const {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
  }
  CAME8BIT_INLINE T* operator->() const { return *this; }
  template <class U>
  CAME8BIT_INLINE U* as() const {
    return static_cast<U*>(static_cast<T*>(*this));
  }
};

// Parameter or gradient; `strides` is null where it is contiguous.
struct Strided {
  Global<void> data;
  Global<const Strides> strides;
  Dtype dtype;
};

// How sweeps A and B cut a matrix: slabs of rows times strips of columns. A thread owns kVector
// neighbouring columns; `lanes` threads stand side by side on a row, so `streams` rows are read at
// once. A tile is `span` strips of a slab, one after the other, and writes one part of each row's
// sum. The shape alone decides, and the order of every sum follows from it (reduction.py).
struct Grid {
  int lanes, streams, span;
  int64_t strips, parts, slabs, slab_rows;

  static CAME8BIT_INLINE Grid of(int64_t b, int64_t n, int64_t k) {
    Grid g = {};
    g.lanes = 1;
    while (g.lanes < kWarp && int64_t{g.lanes} * kVector < k) g.lanes *= 2;
    g.streams = kThreads / g.lanes;
    g.strips = (k + width(g) - 1) / width(g);
    g.slab_rows = g.streams > 16 ? 4 * g.streams : 64;
    // Partial sums stay small; those of huge matrices take 0.006 bytes/element for columns and
    // 0.003 for rows.
    while (g.slab_rows < kMaxSlabRows &&
           b * ((n + g.slab_rows - 1) / g.slab_rows) * k * 12 > kColumnPartBytes) {
      g.slab_rows *= 2;
    }
    g.slabs = (n + g.slab_rows - 1) / g.slab_rows;
    g.span = 1;
    g.parts = g.strips;
    while (g.span < kMaxSpan && b * n * g.parts * 12 > kRowPartBytes) {
      g.span *= 2;
      g.parts = (g.strips + g.span - 1) / g.span;
    }
    return g;
  }
  static CAME8BIT_INLINE int width(const Grid& g) { return g.lanes * kVector; }
};

// Scalars of one parameter during a step. `describe` fills the first part, later kernels the rest.
struct Scalars {
  uint32_t step;  // of this update, 1 for the first
  float lr_scale, shrink, spent, correction2, correction3;
  float predicted_rms, kappa_0;
  float rms, kappa;
  int alive;     // whether this step is still to be made: the gradient is finite
  int u_finite;  // and the preconditioned gradient is, too
  // Of a pass: sums over all ranks have decided these when it begins.
  int decided;
  SharedArguments shared;
};

// One parameter with its state, and pointers into the workspace: matrices, b of n x k. It does not
// derive from ParamArguments, because the order of the fields decides how many registers kernels
// take.
struct Parameter {
  Strided param, grad;
  Global<void> exp_avg;  // int8 codes with `absmax`, fp32, or packed codes
  Global<float> absmax;  // or, of packed codes, the bf16 scales
  Global<float> sq_row, sq_col, res_row, res_col, rms_ratio;
  Global<float> exp_avg_sq;  // full second moment instead of the five above
  Global<int64_t> step, skipped;
  int64_t b, n, k;
  int64_t slices, slice_len, blocks_per_slice;
  uint64_t offset;  // row-major index of the first element in the full parameter
  uint32_t index;
  uint32_t byte_pattern;  // see decode_vector
  int whole_blocks;       // whether every row has blocks of the code of its own
  int apply_rounds;       // rows a thread handles in a tile of sweep C; no result depends on it
  Grid grid;

  // Workspace.
  Global<Scalars> scalars;
  Global<float> row_part, col_part;           // [3][parts][b][n], [3][b][slabs][k]
  Global<float> tile_sum;                     // [b][slabs][strips]: u*u; flat: also, before, g*g
  Global<float> row_new, col_new;             // r, c until they are known to be kept
  Global<float> row_gain, col_factor;         // factors of w
  Global<float> update_row, update_col;       // factors of the update
  Global<float> row_chunk, col_chunk;         // [3][b][row_chunks], [b][col_chunks]
  Global<float> root_mean, total, predicted;  // [b]
  Global<int> agreeing;                       // [apply tiles]

  Global<float> grad_square;  // null, or where the sum of squares of the gradient is wanted
  int64_t bits;               // of the momentum

  // First block of this parameter in the launch of each phase (kernels.cuh).
  int64_t first[kPhases];

  CAME8BIT_INLINE int64_t numel() const { return b * n * k; }
  CAME8BIT_INLINE int64_t row_chunks() const { return (n + kWarp - 1) / kWarp; }
  CAME8BIT_INLINE int64_t col_chunks() const { return (k + kWarp - 1) / kWarp; }
  CAME8BIT_INLINE int64_t tiles() const { return b * grid.slabs * grid.parts; }
  CAME8BIT_INLINE int64_t tile_sums() const { return b * grid.slabs * grid.strips; }
  // Blocks of 256 threads, a warp for each chunk of rows or columns.
  CAME8BIT_INLINE int64_t combine_tasks() const {
    return (b * (row_chunks() + col_chunks()) + kWarps - 1) / kWarps;
  }
  // Blocks of the code that 256 threads have in hand.
  CAME8BIT_INLINE int64_t blocks_at_once() const { return bits < 8 ? 2 * kWarps : kWarps; }
  CAME8BIT_INLINE int64_t apply_rows() const { return int64_t{grid.streams} * apply_rounds; }
};

}  // namespace came8bit
