"""Rounding: of square roots, of fp32 results to bf16 and fp16, and the random bits for it.

Stochastic rounding draws 16 bits per element from Philox4x32-10 (Salmon et al., 2011, "Parallel
random numbers: as easy as 1, 2, 3"), as a pure function of *where* the element is:

    key      = seed (64 bits)
    counter  = (e // 8 as two 32-bit words, parameter index, step of that parameter)
    bits     = half-word e % 8 of the four output words, low half first

with ``e`` the row-major index in the full parameter. So device, thread count, strides, sharding
and resuming do not change the draw. ``csrc/rounding.h`` holds the same expressions.

Written rules for the edges: the magnitude of a value is rounded up with probability equal to the
fraction that is cut off (resolution 2**-16; 2**-13 for normal fp16); fp16 subnormals are rounded to
multiples of 2**-24; magnitudes of at least the largest finite value, infinities and NaN are rounded
to nearest, as a plain cast does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fp32(x: float) -> float:
    """Return ``x`` rounded once to fp32, as a Python float."""
    return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()


def square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root of an fp32 tensor.

    ``torch.sqrt`` of fp32 on a CPU may be a vector library's, whose last bit is sometimes off. The
    root in float64 has enough digits for the second rounding to be the right one.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)


_MASK32 = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_32(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of ``a * constant`` as int64 tensors of unsigned words."""
    low_part = (a & 0xFFFF) * constant
    high_part = (a >> 16) * constant
    middle = (low_part >> 16) + (high_part & 0xFFFF)
    low = ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)
    return (high_part >> 16) + (middle >> 16), low


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Return four words of Philox4x32-10 per counter; all words are int64 tensors in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_32(c0, _PHILOX_M[0])
        high1, low1 = _multiply_32(c2, _PHILOX_M[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return c0, c1, c2, c3


def random_bits(
    numel: int, *, seed: int, index: int, step: int, offset: int = 0, device: torch.device
) -> Tensor:
    """Return 16 random bits for each of ``numel`` elements, int64 of shape ``(numel,)``.

    Args:
        numel: number of elements.
        seed: the 64-bit key.
        index: position of the parameter in ``state_dict()``.
        step: that parameter's own step, 1 for the first.
        offset: row-major index of the first element in the full parameter.
        device: where to put the result.
    """
    if numel == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = offset // 8, (offset + numel - 1) // 8
    block = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    words = philox(
        (
            block & _MASK32,
            (block >> 32) & _MASK32,
            torch.full_like(block, index & _MASK32),
            torch.full_like(block, step & _MASK32),
        ),
        seed,
    )
    halves = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)
    return halves.reshape(-1)[offset - first * 8 :][:numel]


def round_stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round fp32 ``value`` to ``dtype`` (bf16 or fp16) with 16 random ``bits`` per element.

    Args:
        value: fp32 tensor.
        dtype: ``torch.bfloat16`` or ``torch.float16``; fp32 returns ``value`` itself.
        bits: int64 tensor of ``value.shape`` with values in [0, 65536).
    """
    if dtype == torch.float32:
        return value
    pattern = value.contiguous().view(torch.int32)
    nearest = value.to(dtype)
    largest = torch.finfo(dtype).max
    in_range = value.abs() < largest
    if dtype == torch.bfloat16:
        raised = (pattern + bits.to(torch.int32)) & -0x10000
        rounded = torch.where(in_range, raised, 0).view(torch.float32)
        return torch.where(in_range, rounded.to(dtype), nearest)
    raised = (pattern + (bits >> 3).to(torch.int32)) & -0x2000
    normal = torch.where(in_range, raised, 0).view(torch.float32)
    # Below 2**-14 the grid is 2**-24: fixed point with 16 fractional bits, then cut.
    tiny = value.abs() < 2.0**-14
    fixed = (torch.where(tiny, value.abs(), 0.0) * 2.0**40).to(torch.int32) + bits.to(torch.int32)
    magnitude = (fixed >> 16).to(torch.float32) * 2.0**-24
    subnormal = torch.where(torch.signbit(value), -magnitude, magnitude)
    rounded = torch.where(tiny, subnormal, normal)
    return torch.where(in_range, rounded.to(dtype), nearest)
