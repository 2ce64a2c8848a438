"""Sums over rows and columns as fixed trees on 16 virtual lanes.

Floating-point sums depend on their order, so the order is part of the specification: it depends on
the shape alone, not on threads, instruction set or the width of a register. Missing elements count
as zeros. ``csrc/cpu/sweeps.h`` and ``csrc/cpu/tiles.cpp`` add in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
CHUNK = 1024
GROUP = 4


def lane_sum(x: Tensor) -> Tensor:
    """Sum of the last dimension of ``(..., m)``.

    Chunks of 1024; in a chunk lane ``i`` adds elements ``i, i+16, ...`` in order, then the lanes
    are halved 16 -> 8 -> 4 -> 2 -> 1; then the chunks are added in order.
    """
    m = x.shape[-1]
    chunks = max(1, -(-m // CHUNK))
    x = torch.nn.functional.pad(x, (0, chunks * CHUNK - m)).unflatten(-1, (chunks, -1, LANES))
    lanes = torch.zeros_like(x[..., 0, :])
    used = CHUNK if chunks > 1 else m
    for i in range(-(-used // LANES)):
        lanes = lanes + x[..., i, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    total = torch.zeros_like(lanes[..., 0, 0])
    for i in range(chunks):
        total = total + lanes[..., i, 0]
    return total


def slab_rows(b: int, n: int, k: int) -> int:
    """Rows whose column sums are formed in one go; bounds the partial sums of the kernels.

    To 2 MiB, or where that is not enough to 0.012 bytes per element.
    """
    rows = 64
    while rows * 2 <= min(n // 32, 1024):
        rows *= 2
    while rows < 1024 and b * -(-n // rows) * k * 12 > 2 << 20:
        rows *= 2
    return rows


def column_sum(x: Tensor) -> Tensor:
    """Sum over the rows of ``(b, n, k)``.

    Slabs of rows; in a slab groups of four rows, ``(x0 + x1) + (x2 + x3)``, in order; then the
    slabs in order.
    """
    b, n, k = x.shape
    rows = slab_rows(b, n, k)
    slabs = -(-n // rows)
    x = torch.nn.functional.pad(x, (0, 0, 0, slabs * rows - n)).view(b, slabs, -1, GROUP, k)
    groups = (x[..., 0, :] + x[..., 1, :]) + (x[..., 2, :] + x[..., 3, :])
    partial = torch.zeros_like(groups[:, :, 0])
    for i in range(min(groups.shape[2], -(-n // GROUP))):
        partial = partial + groups[:, :, i]
    total = torch.zeros_like(partial[:, 0])
    for i in range(slabs):
        total = total + partial[:, i]
    return total
