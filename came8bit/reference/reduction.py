"""Sums over rows, columns and whole parameters, as fixed trees.

Floating-point sums depend on their order, so the order is part of the specification. It depends on
the shape alone: not on threads, instruction set, width of a register or number of blocks. Missing
elements count as zeros. A processor with vectors and one with warps want different trees; each has
its own, and everything else of a step is the same expression on both.

:data:`CPU_TREE` is what the sweeps in ``csrc/cpu/isa`` and ``csrc/cpu/tiles.cpp`` do,
:data:`CUDA_TREE` is what ``csrc/cuda/*.cuh`` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import pad


class Tree(ABC):
    """The orders in which one kind of device adds."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Return sums of the rows of ``(b, n, k)``, shape ``(b, n)``."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """Return sums of the columns of ``(b, n, k)``, shape ``(b, k)``."""

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """Sum of all of ``(b, n, k)``, 0-d."""

    @abstractmethod
    def total_of_rows(self, x: Tensor) -> Tensor:
        """Sum of all row sums, ``(b, n)``, 0-d."""

    @abstractmethod
    def vector(self, x: Tensor) -> Tensor:
        """Return sums of the row or column statistics ``(b, m)`` of each matrix, shape ``(b,)``."""

    @abstractmethod
    def matrices(self, x: Tensor) -> Tensor:
        """Sum of one value per matrix, ``(b,)``, 0-d."""

    @abstractmethod
    def flat(self, x: Tensor) -> Tensor:
        """Sum of an unfactored parameter, ``(m,)``, 0-d."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _halve(x: Tensor, stop: int = 1) -> Tensor:
    """Halve the last dimension, a power of two, until ``stop`` values are left: first + second."""
    while x.shape[-1] > stop:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def _add_in_order(x: Tensor, dim: int) -> Tensor:
    """Return ``((0 + x_0) + x_1) + ...`` along ``dim``, which disappears."""
    total = x.new_zeros([size for i, size in enumerate(x.shape) if i != dim % x.dim()])
    for part in x.unbind(dim):
        total = total + part
    return total


# --- CPU ------------------------------------------------------------------------------------------

LANES = 16
CHUNK = 1024
GROUP = 4


def lane_sum(x: Tensor) -> Tensor:
    """Sum of the last dimension of ``(..., m)``.

    Chunks of 1024; in a chunk lane ``i`` adds elements ``i, i+16, ...`` in order, then the lanes
    are halved 16 -> 8 -> 4 -> 2 -> 1; then the chunks are added in order.
    """
    m = x.shape[-1]
    chunks = max(1, _ceil_div(m, CHUNK))
    # Vectors of zeros at the end of the only chunk change nothing.
    used = CHUNK if chunks > 1 else LANES * max(1, _ceil_div(m, LANES))
    x = pad(x, (0, chunks * used - m)).unflatten(-1, (chunks, used // LANES, LANES))
    return _add_in_order(_halve(_add_in_order(x, -2)).squeeze(-1), -1)


def slab_rows(b: int, n: int, k: int) -> int:
    """Return how many rows form column sums in one go; bounds the partial sums of the kernels.

    To 2 MiB, or where that is not enough to 0.012 bytes per element.
    """
    rows = 64
    while rows * 2 <= min(n // 32, 1024):
        rows *= 2
    while rows < 1024 and b * _ceil_div(n, rows) * k * 12 > 2 << 20:
        rows *= 2
    return rows


def column_sum(x: Tensor) -> Tensor:
    """Sum over the rows of ``(b, n, k)``.

    Slabs of rows; in a slab groups of four rows, ``(x0 + x1) + (x2 + x3)``, in order; then the
    slabs in order.
    """
    b, n, k = x.shape
    rows = slab_rows(b, n, k)
    slabs = _ceil_div(n, rows)
    x = pad(x, (0, 0, 0, slabs * rows - n)).view(b, slabs, rows // GROUP, GROUP, k)
    groups = (x[..., 0, :] + x[..., 1, :]) + (x[..., 2, :] + x[..., 3, :])
    return _add_in_order(_add_in_order(groups[:, :, : _ceil_div(n, GROUP)], 2), 1)


class _CpuTree(Tree):
    """16 virtual lanes, whatever the width of a register."""

    def rows(self, x: Tensor) -> Tensor:
        return lane_sum(x)

    def columns(self, x: Tensor) -> Tensor:
        return column_sum(x)

    def total(self, x: Tensor) -> Tensor:
        return self.total_of_rows(lane_sum(x))

    def total_of_rows(self, x: Tensor) -> Tensor:
        return lane_sum(x.reshape(-1))

    def vector(self, x: Tensor) -> Tensor:
        return lane_sum(x)

    def matrices(self, x: Tensor) -> Tensor:
        return lane_sum(x)

    def flat(self, x: Tensor) -> Tensor:
        return lane_sum(x)


# --- CUDA -----------------------------------------------------------------------------------------

THREADS = 256  # of a block
WARP = 32
WARPS = THREADS // WARP
VECTOR = 8  # neighbouring elements of a thread
MAX_SLAB_ROWS = 2048
MAX_SPAN = 16
FLAT_ROUNDS = 8


def _sum_vectors(x: Tensor) -> Tensor:
    """Sum eight neighbours ``(..., 8)``: ``((0+1)+(2+3)) + ((4+5)+(6+7))``."""
    for _ in range(3):
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def _streams(x: Tensor, streams: int) -> Tensor:
    """Sum the last dimension: stream ``i`` adds ``i, i+streams, ...`` in order, then halving."""
    m = x.shape[-1]
    rounds = max(1, _ceil_div(m, streams))
    x = pad(x, (0, rounds * streams - m)).unflatten(-1, (rounds, streams))
    return _halve(_add_in_order(x, -2)).squeeze(-1)


class CudaTree(Tree):
    """Blocks of 256 threads in warps of 32; see ``csrc/cuda/reduce.cuh`` and ``tile.cuh``.

    Args:
        column_part_bytes: partial column sums of a parameter take no more, unless tiles would need
            more than 2048 rows for that.
        row_part_bytes: the same of partial row sums, unless tiles would need more than 16 strips.
    """

    def __init__(self, column_part_bytes: int = 2 << 20, row_part_bytes: int = 6 << 20) -> None:
        self._column_part_bytes = column_part_bytes
        self._row_part_bytes = row_part_bytes

    def _grid(self, b: int, n: int, k: int) -> tuple[int, int, int]:
        """Return ``(lanes, slab_rows, span)``: threads along a row, rows and strips of a tile.

        ``256 // lanes`` threads stand below each other, so a strip is as wide as 8 elements per
        lane.
        """
        lanes = 1
        while lanes < WARP and lanes * VECTOR < k:
            lanes *= 2
        rows = max(64, 4 * THREADS // lanes)
        while rows < MAX_SLAB_ROWS and b * _ceil_div(n, rows) * k * 12 > self._column_part_bytes:
            rows *= 2
        span, strips = 1, _ceil_div(k, lanes * VECTOR)
        while span < MAX_SPAN and b * n * _ceil_div(strips, span) * 12 > self._row_part_bytes:
            span *= 2
        return lanes, rows, span

    def rows(self, x: Tensor) -> Tensor:
        """Sum vectors of a thread, lanes halved, strips of a tile in order, tiles by 8 streams."""
        b, n, k = x.shape
        lanes, _, span = self._grid(b, n, k)
        strips = _ceil_div(k, lanes * VECTOR)
        parts = _ceil_div(strips, span)
        x = pad(x, (0, strips * lanes * VECTOR - k)).view(b, n, strips, lanes, VECTOR)
        sums = _halve(_sum_vectors(x)).squeeze(-1)
        sums = pad(sums, (0, parts * span - strips)).view(b, n, parts, span)
        return _streams(_add_in_order(sums, -1), WARPS)

    def _slabs(self, x: Tensor) -> Tensor:
        """Return column sums of every slab, ``(b, slabs, k)``.

        A thread adds every ``256 // lanes``-th row in order, then those threads are halved.
        """
        b, n, k = x.shape
        lanes, rows, _ = self._grid(b, n, k)
        streams = THREADS // lanes
        slabs = _ceil_div(n, rows)
        x = pad(x, (0, 0, 0, slabs * rows - n)).view(b, slabs, rows // streams, streams, k)
        return _halve(_add_in_order(x, 2).transpose(-1, -2)).squeeze(-1)

    def columns(self, x: Tensor) -> Tensor:
        """Sum the slabs by 8 streams."""
        return _streams(self._slabs(x).transpose(-1, -2), WARPS)

    def total(self, x: Tensor) -> Tensor:
        """Halve the columns of each strip of a slab, then sum by 256 streams."""
        b, n, k = x.shape
        lanes, _, _ = self._grid(b, n, k)
        strips = _ceil_div(k, lanes * VECTOR)
        slabs = pad(self._slabs(x), (0, strips * lanes * VECTOR - k))
        tiles = _halve(slabs.unflatten(-1, (strips, lanes * VECTOR)))
        return _streams(tiles.reshape(-1), THREADS)

    def total_of_rows(self, x: Tensor) -> Tensor:
        """Sum each matrix as a vector, then the matrices."""
        return self.matrices(self.vector(x))

    def vector(self, x: Tensor) -> Tensor:
        """Halve chunks of 32, then sum the chunks by 32 streams."""
        m = x.shape[-1]
        chunks = max(1, _ceil_div(m, WARP))
        x = pad(x, (0, chunks * WARP - m)).unflatten(-1, (chunks, WARP))
        return _streams(_halve(x).squeeze(-1), WARP)

    def matrices(self, x: Tensor) -> Tensor:
        """Sum by 32 streams."""
        return _streams(x, WARP)

    def flat(self, x: Tensor) -> Tensor:
        """Sum tiles of 8 rounds of 256 vectors: rounds in order, threads halved, 256 streams."""
        tile = FLAT_ROUNDS * THREADS * VECTOR
        tiles = max(1, _ceil_div(x.numel(), tile))
        x = pad(x, (0, tiles * tile - x.numel())).view(tiles, FLAT_ROUNDS, THREADS, VECTOR)
        sums = _halve(_add_in_order(_sum_vectors(x), 1)).squeeze(-1)
        return _streams(sums, THREADS)


CPU_TREE: Tree = _CpuTree()
CUDA_TREE: Tree = CudaTree()
