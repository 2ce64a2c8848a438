"""How momentum is stored: one table of rungs, from fp32 down to no bits at all.

:data:`RUNGS` maps ``optim_bits`` to a :class:`Rung`. All of them cut every slice of the first
dimension into blocks of consecutive values, as ``quant.py`` describes for 8 bits, and a slice takes
whole bytes, so that a row shard owns whole blocks of every rung.

The coarse rungs, 4 bits and fewer, pack several codes into a ``uint8``, the first in the lowest
bits, and keep bf16 scales. What a coarse code cannot remember is not lost: the step spends it at
once (``update.py``), so they need no rule for values that only decay. The step hands them 0 where
the update was exactly zero, and 0 is what they give back:

* 4 bits: the square-root code of 8 bits with levels up to 7. The levels are those of the fp32
  absmax; bf16 holds what decoding multiplies by.
* 2 bits: sign, and whether the magnitude is above the block's mean. The two levels are the means of
  the magnitudes above and below. A block that holds a 0 has a lower level of 0.
* 0 bits: nothing, so every step spends its whole update, and the instability is the square of the
  update itself. Codes and scales are tensors without elements.

Sums of 2-bit blocks are exact, so their order does not matter: magnitudes are first rounded to
``2**-16`` of the block's scale, and 128 of those fit into the 24 bits of fp32.

Laws of the coarse codes (tested): 0 <-> 0; encode(decode(code)) == code, scales included; odd, but
for the 0; monotone; a value that is not finite leaves the rest of its block alone: with 4 bits it
becomes code -8, which decodes to NaN, with 2 bits, which have no code to spare, 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .quant import BLOCK_SIZE, dequantize_blockwise, quantize_blockwise, root_levels, slice_shape
from .rounding import fp32

COARSE_BLOCK = 128
"""Values that share scales, with 4 and with 2 bits."""

LARGEST_BF16 = 2.0**128 - 2.0**120
"""Scales round to nearest, but never to infinity."""

SMALLEST_LEVEL = 2.0**-100
"""2-bit blocks whose upper level is below this store zeros."""

_TOP = 7  # the largest level of 4 bits
_INVERSE_7 = fp32(1.0 / 7.0)
_NAN_NIBBLE = -8


@dataclass(frozen=True)
class Rung:
    """One way of storing momentum.

    Attributes:
        bits: of a value; 8 are an ``int8``, fewer are packed into ``uint8``; 32 has no codes.
        block: values that share scales.
        scales: scales of a block.
        scales_name: name of the buffer that has them.
        scale_dtype: their dtype.
        spends: whether the step spends what the code does not remember.
    """

    bits: int
    block: int
    scales: int
    scales_name: str
    scale_dtype: torch.dtype
    spends: bool

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the buffer with the codes."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the codes: ``shape``, or ``(slices, bytes of a slice)``."""
        if self.bits == 8:
            return tuple(shape)
        slices, slice_len = slice_shape(shape)
        return (slices, -(-slice_len * self.bits // 8))

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(slices, blocks)``, and another dimension where a block has not one scale."""
        slices, slice_len = slice_shape(shape)
        blocks = (slices, -(-slice_len // self.block))
        return blocks if self.scales == 1 else (*blocks, self.scales)

    def encode(self, m: Tensor, idle: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of the fp32 ``m``, of the parameter's shape.

        Args:
            m: momentum.
            idle: where the update was exactly zero: there 8 bits round toward zero, and the coarse
                rungs store 0.
        """
        if not self.spends:
            return quantize_blockwise(m, decaying=idle)
        if not self.bits:
            codes = m.new_empty(self.codes_shape(m.shape), dtype=self.code_dtype)
            return codes, m.new_empty(self.scales_shape(m.shape), dtype=self.scale_dtype)
        encode = _encode_4 if self.bits == 4 else _encode_2
        blocks, valid = _to_blocks(torch.where(idle, 0.0, m), self.block)
        codes, scales = encode(blocks, valid)
        slice_len = slice_shape(m.shape)[1]
        return self._pack(codes.flatten(1)[:, :slice_len]), scales

    def decode(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], factor: float = 1.0
    ) -> Tensor:
        """Return fp32 momentum of ``shape``, its scales multiplied by ``factor``."""
        if not codes.numel():
            return torch.zeros(shape, device=codes.device)
        scales = scales.to(torch.float32)
        if factor != 1.0:
            scales = scales * fp32(factor)
        if not self.spends:
            return dequantize_blockwise(codes, scales)
        slice_len = slice_shape(shape)[1]
        blocks, _ = _to_blocks(self._unpack(codes)[:, :slice_len], self.block)
        values = (_decode_4 if self.bits == 4 else _decode_2)(blocks, scales)
        return values.flatten(1)[:, :slice_len].reshape(shape).contiguous()

    def _pack(self, codes: Tensor) -> Tensor:
        slices, slice_len = codes.shape
        per_byte = 8 // self.bits
        size = -(-slice_len // per_byte)
        codes = torch.nn.functional.pad(codes, (0, size * per_byte - slice_len))
        codes = (codes & (2**self.bits - 1)).view(slices, size, per_byte)
        shifts = torch.arange(0, 8, self.bits, device=codes.device)
        packed: Tensor = (codes << shifts).sum(-1)
        return packed.to(torch.uint8)

    def _unpack(self, packed: Tensor) -> Tensor:
        shifts = torch.arange(0, 8, self.bits, device=packed.device)
        codes: Tensor = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        return codes.flatten(1)


RUNGS: dict[int, Rung] = {
    8: Rung(8, BLOCK_SIZE, 1, "absmax", torch.float32, spends=False),
    4: Rung(4, COARSE_BLOCK, 1, "scales", torch.bfloat16, spends=True),
    2: Rung(2, COARSE_BLOCK, 2, "scales", torch.bfloat16, spends=True),
    0: Rung(0, COARSE_BLOCK, 0, "scales", torch.bfloat16, spends=True),
}
"""``optim_bits`` -> how momentum is stored; 32, which is not here, is plain fp32."""


class Stored(Protocol):
    """A tensor, or the description of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""


def rung_of(exp_avg: Stored, scales: Stored | None) -> Rung | None:
    """Return the rung that these buffers are on, None for fp32 momentum."""
    if scales is None:
        return None
    if exp_avg.dtype == torch.int8:
        return RUNGS[8]
    if len(scales.shape) == 2:
        return RUNGS[4]
    return RUNGS[2] if scales.shape[2] else RUNGS[0]


def has_nan(codes: Tensor, scales: Tensor | None) -> bool:
    """Return whether packed codes have one that decodes to NaN; only 4 bits can."""
    if rung_of(codes, scales) is not RUNGS[4]:
        return False
    nan = _NAN_NIBBLE & 15
    return bool(((codes & 15 == nan) | (codes >> 4 == nan)).any())


def momentum_shape(buffers: Mapping[str, Stored], shape: tuple[int, ...]) -> torch.Size:
    """Return the shape of the parameter whose momentum is in ``buffers``.

    Packed codes do not tell: it is ``shape`` if they fit it, else ``(slices, values of a slice)``
    with the padding of the last byte, and without codes that of the last block.
    """
    codes, scales = buffers["exp_avg"], buffers.get("scales")
    rung = rung_of(codes, scales)
    if rung is None or scales is None:
        return torch.Size(codes.shape)
    if (codes.shape, scales.shape) == (rung.codes_shape(shape), rung.scales_shape(shape)):
        return torch.Size(shape)
    values = codes.shape[1] * 8 // rung.bits if rung.bits else scales.shape[1] * rung.block
    return torch.Size((codes.shape[0], values))


def momentum_fits(buffers: Mapping[str, Stored], shape: tuple[int, ...]) -> bool:
    """Return whether ``buffers`` have momentum, and that of a parameter of ``shape``."""
    if "scales" in buffers:
        return "exp_avg" in buffers and momentum_shape(buffers, shape) == shape
    return "exp_avg" in buffers and buffers["exp_avg"].shape == shape


@dataclass(frozen=True)
class Momentum:
    """The buffers that hold the momentum of a parameter of ``shape``; fp32 without ``scales``."""

    exp_avg: Tensor
    scales: Tensor | None
    shape: tuple[int, ...]

    @property
    def rung(self) -> Rung | None:
        """None for fp32."""
        return rung_of(self.exp_avg, self.scales)

    def load(self) -> Tensor:
        """Return ``m``, fp32 of the parameter's shape."""
        if self.rung is None or self.scales is None:
            return self.exp_avg
        return self.rung.decode(self.exp_avg, self.scales, self.shape)

    def decayed(self, beta1: float) -> Tensor:
        """Return ``beta1*m``; of codes the scale of the block is multiplied, not every value."""
        if self.rung is None or self.scales is None:
            return self.exp_avg * fp32(beta1)
        return self.rung.decode(self.exp_avg, self.scales, self.shape, beta1)

    def encode(self, m: Tensor, idle: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return what :meth:`store` keeps of ``m`` and, if the step spends the rest, its values."""
        m = m.view(self.shape)
        if self.rung is None:
            return (m,), None
        coded = self.rung.encode(m, idle.view(self.shape))
        return coded, self.rung.decode(*coded, self.shape) if self.rung.spends else None

    def store(self, coded: tuple[Tensor, ...]) -> None:
        """Replace the momentum."""
        self.exp_avg.copy_(coded[0])
        if self.scales is not None:
            self.scales.copy_(coded[1])


def _to_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return ``x`` as ``(slices, blocks, size)`` in row-major order, and which is not padding."""
    slices, slice_len = slice_shape(x.shape)
    blocks = -(-slice_len // size)
    padding = (0, blocks * size - slice_len)
    flat = torch.nn.functional.pad(x.reshape(slices, slice_len), padding)
    valid = torch.arange(blocks * size, device=x.device) < slice_len
    return flat.view(slices, blocks, size), valid.view(1, blocks, size)


def _to_bf16(x: Tensor) -> Tensor:
    return x.clamp(max=LARGEST_BF16).to(torch.bfloat16)


def _encode_4(blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    level, absmax = root_levels(blocks, _TOP)
    codes = torch.where(blocks < 0, -level, level).to(torch.int32)
    return torch.where(blocks.abs() < math.inf, codes, _NAN_NIBBLE), _to_bf16(absmax)


def _decode_4(codes: Tensor, scales: Tensor) -> Tensor:
    signed = (codes ^ 8) - 8  # 4-bit two's complement
    t = signed.to(torch.float32) * _INVERSE_7
    value = (t * t.abs()) * scales.unsqueeze(-1)
    return torch.where(signed == _NAN_NIBBLE, math.nan, value)


def _encode_2(blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    finite = blocks.abs() < math.inf
    magnitude = torch.where(finite, blocks.abs(), 0.0)
    # The power of two 2**(e - 16), 2**e being that of the block's largest value in bf16.
    largest = _to_bf16(magnitude.amax(-1, keepdim=True)).to(torch.float32)
    exponent = (largest.view(torch.int32) >> 23).clamp(min=17) - 16  # biased, of the unit
    unit = (exponent << 23).view(torch.float32)
    whole = torch.round(magnitude * ((254 - exponent) << 23).view(torch.float32))
    # From here to the levels everything is exact but the two divisions.
    count = valid.to(torch.float32).sum(-1, keepdim=True)
    total = whole.sum(-1, keepdim=True)
    above = whole * count > total
    above_count = above.to(torch.float32).sum(-1, keepdim=True)
    above_sum = torch.where(above, whole, 0.0).sum(-1, keepdim=True)
    low = torch.round((total - above_sum) / (count - above_count).clamp(min=1.0)) * unit
    has_zero = ((magnitude == 0) & valid).any(-1, keepdim=True)
    low = _to_bf16(torch.where(has_zero, 0.0, low))
    high = _to_bf16((above_sum / above_count.clamp(min=1.0)) * unit)
    high = torch.where(high > low, high, low)  # also where nothing is above
    dead = high < SMALLEST_LEVEL
    high, low = (torch.where(dead, 0.0, level) for level in (high, low))
    above = above & (high > low)
    negative = (blocks < 0) & (torch.where(above, high, low) > 0)
    codes = above.to(torch.int32) + 2 * negative.to(torch.int32)
    return codes, torch.cat([low, high], dim=-1)


def _decode_2(codes: Tensor, scales: Tensor) -> Tensor:
    low, high = scales[..., :1], scales[..., 1:]
    value = torch.where(codes & 1 == 1, high, low)
    return torch.where(codes & 2 == 2, -value, value)
