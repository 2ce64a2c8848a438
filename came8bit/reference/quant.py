"""The 8-bit code of the momentum: signed, companded, scaled by the absmax of a block of 256 values.

A tensor is seen as ``slices`` (its first dimension; one slice if it has fewer than two dimensions).
Every slice is cut into blocks of :data:`BLOCK_SIZE` consecutive values in row-major order, the last
one shorter, so a block never crosses a slice and a row shard owns whole blocks. A block keeps
``absmax``, its largest finite magnitude, and one int8 code per value:

    code  = sign(x) * floor(127 * compand(|x| / absmax) + bias)        -127 ... 127
    value = sign(code) * expand(|code| / 127) * absmax

The kernels' map is the square root, whose inverse is a square: there the code is the largest whole
``q`` with ``(q - bias)**2 <= 16129 * |x| / absmax``, decided by that comparison and not by a root,
so any processor's fast approximate root may make the first guess.

``bias`` is 1/2 (nearest in the companded domain), or :data:`DECAY_BIAS` for values whose update is
zero: those round toward zero, because with nearest rounding ``m <- beta1 * m`` has fixed points
other than 0 and a dead row would keep moving for ever. The small bias absorbs the rounding of the
expression itself, so that a value which has not changed keeps its code.

Laws (tested): 0 <-> 0; +-absmax <-> itself; odd; monotone; encode(decode(code)) == code; a block
whose absmax is below 2**-126 stores zeros; a value that is not finite becomes code -128, which
decodes to NaN, and leaves the rest of its block alone.

The kernels implement the ``"sqrt"`` map; the others stay here so that the choice can be measured
(``docs/internals/quantization.md``). ``csrc/quant.h`` holds the same expressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import square_root

BLOCK_SIZE = 256
"""Values that share one fp32 scale."""

DECAY_BIAS = 2.0**-14
"""Rounding bias of a value that only decays; 4x the worst rounding error of the expression."""

NAN_CODE = -128
"""The code of a value that is not finite."""

SMALLEST_ABSMAX = 2.0**-126
"""Blocks below this (the smallest normal fp32) store zeros: 1/absmax would overflow."""


_TINY_ABSMAX = 2.0**-100


class CodeMap(NamedTuple):
    """A pair of monotone maps of [0, 1] onto itself, inverse to each other up to rounding."""

    compand: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor], Tensor]


CODE_MAPS: dict[str, CodeMap] = {
    "sqrt": CodeMap(square_root, lambda t: t * t),
    "softsign": CodeMap(lambda y: (y * 2) / (y + 1), lambda t: t / (2 - t)),
    "uniform": CodeMap(lambda y: y, lambda t: t),
}


def blocks_per_slice(slice_len: int) -> int:
    """Return the number of blocks in a slice of ``slice_len`` values."""
    return -(-slice_len // BLOCK_SIZE)


def slice_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return ``(slices, slice_len)`` of a tensor of ``shape``; one slice below two dimensions."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return (1, numel)
    return (shape[0], numel // shape[0] if shape[0] else 0)


def absmax_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return the shape ``(slices, blocks)`` of the scales that belong to a tensor of ``shape``."""
    slices, slice_len = slice_shape(shape)
    return (slices, blocks_per_slice(slice_len))


def _to_blocks(x: Tensor) -> Tensor:
    """Return a ``(slices, blocks, 256)`` copy of ``x`` in row-major order, padded with zeros."""
    slices, slice_len = slice_shape(x.shape)
    blocks = blocks_per_slice(slice_len)
    flat = x.reshape(slices, slice_len)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK_SIZE - slice_len))
    return padded.view(slices, blocks, BLOCK_SIZE)


def _from_blocks(blocks: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    slices, slice_len = slice_shape(shape)
    padded_len = blocks_per_slice(slice_len) * BLOCK_SIZE
    return blocks.reshape(slices, padded_len)[:, :slice_len].reshape(shape)


def quantize_blockwise(
    x: Tensor, *, decaying: Tensor | None = None, code: str = "sqrt"
) -> tuple[Tensor, Tensor]:
    """Encode ``x``.

    Args:
        x: fp32 tensor of any shape and strides.
        decaying: bool tensor of the same shape; ``True`` rounds that value toward zero.
        code: name of the map, one of :data:`CODE_MAPS`.

    Returns:
        ``(codes, absmax)``: int8 of ``x.shape`` (contiguous), fp32 of ``absmax_shape(x.shape)``.

    Raises:
        TypeError: ``x`` is not fp32.
        ValueError: unknown ``code``.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"quantize_blockwise: got {x.dtype}, expected torch.float32; cast first")
    compand = _code_map(code).compand
    blocks = _to_blocks(x)
    marks = None if decaying is None else _to_blocks(decaying)
    level, absmax = root_levels(blocks, 127, marks, None if code == "sqrt" else compand)
    signed = torch.where(blocks < 0, -level, level)
    codes = torch.where(blocks.abs() < math.inf, signed, NAN_CODE).to(torch.int8)
    return _from_blocks(codes, x.shape).contiguous(), absmax


def root_levels(
    blocks: Tensor,
    top: int,
    decaying: Tensor | None = None,
    compand: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return levels 0 to ``top`` of the magnitudes in ``(slices, blocks, size)``, and every absmax.

    Args:
        blocks: fp32; where it is not finite the level means nothing.
        top: the level of absmax.
        decaying: where to round toward zero.
        compand: another map than the square root.
    """
    magnitude = blocks.abs()
    finite = magnitude < math.inf
    absmax = torch.where(finite, magnitude, 0.0).amax(dim=-1)
    absmax = torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    # top**2/absmax of a tiny block would overflow: those are scaled by a power of two first.
    factor = torch.where(absmax < _TINY_ABSMAX, 2.0**64, 1.0)
    # Tensor by tensor: a number divided by a tensor is its reciprocal times the number in PyTorch.
    scale = torch.full_like(absmax, float(top * top)) / (absmax * factor)
    scale = torch.where(absmax > 0, scale, 0.0).unsqueeze(-1)
    square = (torch.where(finite, magnitude, 0.0) * factor.unsqueeze(-1)) * scale
    bias = torch.full_like(square, 0.5)
    if decaying is not None:
        bias = torch.where(decaying, DECAY_BIAS, bias)
    if compand is None:
        level = _largest_level(square, bias)
    else:
        level = compand((square / float(top * top)).clamp(max=1.0)) * float(top) + bias
    return level.to(torch.int32), absmax


def _largest_level(square: Tensor, bias: Tensor) -> Tensor:
    """Return the largest whole ``q`` with ``(q - bias)**2 <= square``, as fp32."""
    level = (square.sqrt().floor() - 1.0).clamp_(min=0.0)
    for _ in range(3):
        edge = level + (1.0 - bias)
        level = torch.where(edge * edge > square, level, level + 1.0)
    return level


def dequantize_blockwise(codes: Tensor, absmax: Tensor, *, code: str = "sqrt") -> Tensor:
    """Decode to a new contiguous fp32 tensor of ``codes.shape``.

    Args:
        codes: int8 tensor.
        absmax: fp32 tensor of ``absmax_shape(codes.shape)``.
        code: name of the map the codes were made with.

    Raises:
        TypeError: wrong dtype.
        ValueError: ``absmax`` has another shape than the codes need.
    """
    if codes.dtype != torch.int8 or absmax.dtype != torch.float32:
        raise TypeError(
            f"dequantize_blockwise: got codes {codes.dtype} and absmax {absmax.dtype}, "
            "expected torch.int8 and torch.float32"
        )
    expected = absmax_shape(codes.shape)
    if tuple(absmax.shape) != expected:
        raise ValueError(
            f"dequantize_blockwise: got absmax of shape {tuple(absmax.shape)}, expected "
            f"{expected} for codes of shape {tuple(codes.shape)}"
        )
    expand = _code_map(code).expand
    blocks = _to_blocks(codes)
    # A product with fp32(1/127), not a division: exact at 127, and what the kernels do.
    t = blocks.to(torch.float32) * _INVERSE_127
    value = torch.where(t < 0, -expand(t.abs()), expand(t.abs())) * absmax.unsqueeze(-1)
    value = torch.where(blocks == NAN_CODE, math.nan, value)
    return _from_blocks(value, codes.shape).contiguous()


_INVERSE_127 = torch.tensor(1.0 / 127.0, dtype=torch.float32).item()


def _code_map(code: str) -> CodeMap:
    if code not in CODE_MAPS:
        raise ValueError(f"got code map {code!r}, expected one of {sorted(CODE_MAPS)}")
    return CODE_MAPS[code]
