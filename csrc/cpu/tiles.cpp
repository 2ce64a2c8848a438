#include "tiles.h"

#include <algorithm>

namespace came8bit {
namespace {

constexpr int64_t kColumnPartBytes = 2 << 20;

// As slab_rows in reduction.py.
int64_t slab_rows(int64_t b, int64_t n, int64_t k) {
  int64_t rows = 64;
  while (rows * 2 <= std::min<int64_t>(n / 32, 1024)) rows *= 2;
  while (rows < 1024 && b * ((n + rows - 1) / rows) * k * 12 > kColumnPartBytes) rows *= 2;
  return rows;
}

// One task of a grid.
struct Tile {
  int64_t batch, slab, strip;
  int64_t row, col;  // first one, in its matrix
  int rows, cols;

  Tile(const CpuGrid& grid, int64_t task) {
    strip = task % grid.strips;
    slab = task / grid.strips % grid.slabs;
    batch = task / grid.strips / grid.slabs;
    row = slab * grid.slab_rows;
    col = strip * kChunk;
    rows = static_cast<int>(std::min(grid.slab_rows, grid.n - row));
    cols = static_cast<int>(std::min<int64_t>(kChunk, grid.k - col));
  }
};

float* row_part(const CpuGrid& grid, const Workspace& w, int sum, const Tile& t) {
  return w.row_part[sum] + (t.strip * grid.b + t.batch) * grid.n + t.row;
}

float* zeroed_col_part(const CpuGrid& grid, const Workspace& w, int sum, const Tile& t) {
  float* part = w.col_part[sum] + (t.slab * grid.b + t.batch) * grid.k + t.col;
  std::fill(part, part + t.cols, 0.0f);
  return part;
}

// Four rows of a tile in one piece, for what the kernels cannot read where it is.
struct GroupBuffer {
  alignas(64) float value[kGroup * kChunk];
};

void gather(const StridedRuns& from, int64_t first, int64_t row_stride, int rows, int cols,
            GroupBuffer& buffer) {
  for (int i = 0; i < rows; ++i) {
    char* out = reinterpret_cast<char*>(buffer.value) + i * kChunk * from.itemsize();
    from.read(first + i * row_stride, cols, out);
  }
}

// Momentum in 8 bits whose blocks do not begin with the rows, or in packed codes.
void gather_momentum(const Parameter& p, int64_t first, int rows, int cols, GroupBuffer& buffer) {
  const Kernels& table = kernels();
  const int64_t block_size = p.coarse() ? kCoarseBlock : kBlockSize;
  for (int i = 0; i < rows; ++i) {
    float* out = buffer.value + i * kChunk;
    int64_t e = first + i * p.k;
    int64_t slice = e / p.slice_len, in_slice = e % p.slice_len;
    for (const int64_t end = e + cols; e < end;) {
      const int64_t of_slice = in_slice / block_size, in_block = in_slice % block_size;
      const int64_t block = slice * p.blocks_per_slice + of_slice;
      const int size =
          static_cast<int>(std::min({block_size - in_block, p.slice_len - in_slice, end - e}));
      if (p.coarse()) {
        coarse_code(p).decode(packed_codes(p, slice, in_slice), codes_before(p, in_slice),
                              scales_of(p, block), 1.0f, size, out);
      } else {
        table.decode(static_cast<const int8_t*>(p.exp_avg) + e, p.absmax[block], size, out);
      }
      out += size;
      e += size;
      in_slice += size;
      if (in_slice == p.slice_len) {
        in_slice = 0;
        ++slice;
      }
    }
  }
}

// Rounded up to whole cache lines.
int64_t whole_lines(int64_t floats) {
  return (floats + kLanes - 1) / kLanes * kLanes;
}

}  // namespace

CpuGrid::CpuGrid(const Parameter& p)
    : b(p.b), n(p.n), k(p.k), slab_rows(came8bit::slab_rows(b, n, k)) {
  slabs = (n + slab_rows - 1) / slab_rows;
  strips = (k + kChunk - 1) / kChunk;
}

int64_t Workspace::floats(const CpuGrid& g) {
  const int64_t rows = g.b * g.n, cols = g.b * g.k;
  return 5 * (whole_lines(rows) + whole_lines(cols)) +
         3 * (whole_lines(rows * g.strips) + whole_lines(cols * g.slabs));
}

void Workspace::lay_out(const CpuGrid& g, float* kept) {
  const int64_t rows = g.b * g.n, cols = g.b * g.k;
  float* next = scratch();
  const auto take = [&next](int64_t size) {
    float* taken = next;
    next += whole_lines(size);
    return taken;
  };
  const auto keep = [&](int64_t size) {
    if (kept == nullptr) return take(size);
    float* taken = kept;
    kept += size;
    return taken;
  };
  row_factor = keep(rows);
  col_factor = keep(cols);
  row_new = keep(rows);
  col_new = keep(cols);
  for (int s = 0; s < 3; ++s) {
    row_sum[s] = keep(rows);
    col_sum[s] = keep(cols);
    // A single part is the sum.
    row_part[s] = g.strips == 1 ? row_sum[s] : take(rows * g.strips);
    col_part[s] = g.slabs == 1 ? col_sum[s] : take(cols * g.slabs);
  }
}

void second_moment_task(const Parameter& p, const CpuGrid& grid, Workspace& w, int64_t task) {
  const Tile t(grid, task);
  const int64_t first = (t.batch * p.n + t.row) * p.k + t.col;
  const auto second_moment = kernels().second_moment[p.grad_dtype];
  SecondMomentTile tile = {};
  tile.cols = t.cols;
  tile.row_sum = row_part(grid, w, 0, t);
  tile.col_sum = zeroed_col_part(grid, w, 0, t);
  if (p.grad.contiguous()) {
    tile.grad = p.grad.at(first);
    tile.stride = p.k;
    tile.rows = t.rows;
    second_moment(tile);
    return;
  }
  GroupBuffer grad;
  tile.grad = grad.value;
  tile.stride = kChunk;
  for (int i = 0; i < t.rows; i += kGroup, tile.row_sum += kGroup) {
    tile.rows = std::min(kGroup, t.rows - i);
    gather(p.grad, first + i * p.k, p.k, tile.rows, t.cols, grad);
    second_moment(tile);
  }
}

void instability_task(const Parameter& p, const CpuGrid& grid, Workspace& w, float kappa_0,
                      int64_t task) {
  const Tile t(grid, task);
  const int64_t row = t.batch * p.n + t.row;
  const int64_t first = row * p.k + t.col;
  const bool coded = codes_begin_with_rows(p);
  const bool decoded = p.bits < 32 && !coded;
  const Kernels& table = kernels();
  const auto instability = (!coded        ? table.instability32
                            : p.bits == 8 ? table.instability8
                            : p.bits == 4 ? table.instability4
                                          : table.instability2)[p.grad_dtype];

  InstabilityTile tile = {};
  tile.grad = p.grad.contiguous() ? p.grad.at(first) : nullptr;
  tile.stride = p.k;
  tile.rows = t.rows;
  tile.cols = t.cols;
  const int64_t bits = decoded ? 32 : p.bits;
  tile.momentum_stride = p.k * bits / 8;
  tile.momentum = static_cast<const char*>(p.exp_avg) + first * bits / 8;
  if (coded) {
    const int64_t block_size = p.coarse() ? kCoarseBlock : kBlockSize;
    const int64_t blocks = (p.k + block_size - 1) / block_size;
    const int64_t block = row * blocks + t.col / block_size;
    tile.scales_stride = blocks * scales_of_block(p.bits);
    tile.scales = p.coarse() ? static_cast<const void*>(scales_of(p, block)) : p.absmax + block;
  }
  tile.row_factor = w.row_factor + row;
  tile.col_factor = w.col_factor + t.batch * p.k + t.col;
  tile.kappa_0 = kappa_0;
  for (int s = 0; s < 3; ++s) {
    tile.row_sum[s] = row_part(grid, w, s, t);
    tile.col_sum[s] = zeroed_col_part(grid, w, s, t);
  }
  if (p.grad.contiguous() && !decoded) {
    instability(tile);
    return;
  }
  GroupBuffer grad, momentum;
  for (int i = 0; i < t.rows; i += kGroup) {
    const int64_t e = first + i * p.k;
    tile.rows = std::min(kGroup, t.rows - i);
    tile.grad = p.grad.contiguous() ? p.grad.at(e) : grad.value;
    if (!p.grad.contiguous()) {
      gather(p.grad, e, p.k, tile.rows, t.cols, grad);
      tile.stride = kChunk;
    }
    if (decoded) {
      gather_momentum(p, e, tile.rows, t.cols, momentum);
      tile.momentum = momentum.value;
      tile.momentum_stride = kChunk * sizeof(float);
    }
    instability(tile);
    tile.row_factor += kGroup;
    for (float*& sum : tile.row_sum) sum += kGroup;
    if (decoded) continue;
    tile.momentum = static_cast<const char*>(tile.momentum) + kGroup * tile.momentum_stride;
    if (coded) {
      const int64_t itemsize = p.coarse() ? sizeof *p.scales : sizeof *p.absmax;
      tile.scales = static_cast<const char*>(tile.scales) + kGroup * tile.scales_stride * itemsize;
    }
  }
}

void add_parts(const CpuGrid& grid, Workspace& w, int sums) {
  const auto add = kernels().add;
  const int64_t rows = grid.b * grid.n, cols = grid.b * grid.k;
  const auto add_up = [add](const float* part, int64_t parts, int64_t size, float* sum) {
    if (parts == 1) return;
    std::fill(sum, sum + size, 0.0f);
    for (int64_t i = 0; i < parts; ++i) add(sum, part + i * size, size);
  };
  for (int s = 0; s < sums; ++s) {
    add_up(w.row_part[s], grid.strips, rows, w.row_sum[s]);
    add_up(w.col_part[s], grid.slabs, cols, w.col_sum[s]);
  }
}

}  // namespace came8bit
