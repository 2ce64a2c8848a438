"""Blocks of the 8-bit code: values, scales, and the bounds on its errors."""

from __future__ import annotations

import torch

from came8bit.ops import libraries
from came8bit.reference.quant import BLOCK_SIZE, SMALLEST_ABSMAX

U = 2.0**-24  # unit roundoff of fp32

ISAS = libraries.supported_cpu_isas()


# A level is sqrt(16129*y). The two roundings of x * (16129/absmax) shift it by at most 127 * U. The
# comparison with (q + 1/2)**2 is exact: that is a multiple of 1/4 below 2**14. The factor covers
# second-order terms.
LEVEL_ERROR = 127 * U * 1.01


# The middle of levels q and q+1 is (q*q + q + 1/2)/16129 by value and (q*q + q + 1/4)/16129 in the
# companded domain. Between the two, the code is not the nearest by value, and is the farther one by
# up to twice that distance.
EXCESS_IN_VALUE = 1 / (2 * 127**2)


# Relative to absmax: four roundings in a decoded value (1/127, t, t*t, the product) and the shift
# of a boundary (2U), counted twice because both candidates move.
VALUE_ROUNDING = 12 * U


SCALES = (
    SMALLEST_ABSMAX,
    SMALLEST_ABSMAX * (1 + 2.0**-23),
    1e-30,
    2.0**-20,
    3.1e-5,
    1 / 3,
    1.0,
    1 + 2.0**-23,
    2 - 2.0**-23,
    1.9921875,
    12345.678,
    2.0**-100 * (1 - 2.0**-24),  # below 2**-100 the block is scaled by a power of two first
    2.0**-100,
    2.0**127 * (1 + 2.0**-23),
    3.3895314e38,  # the largest bf16
    3.4028235e38,  # the largest fp32
)


def fp32(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64).to(torch.float32)


def all_bf16() -> torch.Tensor:
    """Every bf16 pattern as fp32, shape (65536,)."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return patterns.view(torch.bfloat16).to(torch.float32)


def in_blocks(values: torch.Tensor, absmax: torch.Tensor, size: int = BLOCK_SIZE) -> torch.Tensor:
    """Those of ``values`` that fit, sorted, in blocks of ``size`` that begin with ``absmax``."""
    values = values[values.abs() <= absmax].sort().values
    values = torch.nn.functional.pad(values, (0, -len(values) % (size - 1))).view(-1, size - 1)
    return torch.cat([absmax.expand(len(values), 1), values], dim=1)


def all_levels(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code in one block, for each of the scales: int8 ``(n, 255)``, fp32 ``(n, 1)``."""
    codes = torch.arange(-127, 128, dtype=torch.int8).expand(len(absmax), 255).contiguous()
    return codes, absmax.view(-1, 1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, the sign of 0 and of NaN included."""
    as_int = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(a.dtype, a.dtype)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(as_int), b.view(as_int))


def check_against_brute_force(x, codes, absmax):
    """The code is an argmin of |127 sqrt(y) - level|, or as good up to rounding errors of y."""
    scale = absmax.double().repeat_interleave(BLOCK_SIZE, dim=1)[:, : x.shape[1]]
    x, codes = x.double(), codes.double()
    assert (codes * x >= 0).all()
    y = x.abs() / scale
    level = 127 * y.sqrt()
    best = brute_force(level.flatten(), torch.arange(128, dtype=torch.float64)).view(x.shape)
    excess = (codes.abs() - level).abs() - (best - level).abs()
    assert (excess <= 2 * LEVEL_ERROR).all()

    # By value: at most EXCESS_IN_VALUE of absmax worse than the nearest of all values.
    table = torch.arange(128, dtype=torch.float64).square() / 127**2
    nearest = brute_force(y.flatten(), table).view(x.shape)
    error = (codes.abs().square() / 127**2 - y).abs()
    assert (error - (nearest - y).abs() <= EXCESS_IN_VALUE + VALUE_ROUNDING).all()
    # Half a level, seen by value: |a - b| = |sqrt a - sqrt b| * (sqrt a + sqrt b).
    assert (error <= (2 * y.sqrt() + 1 / 254) / 254 + VALUE_ROUNDING).all()


def brute_force(x, table):
    """The entry of ``table`` nearest to each of ``x``, by looking at all of them."""
    chunks = [table[(part.unsqueeze(-1) - table).abs().argmin(-1)] for part in x.split(8192)]
    return torch.cat(chunks)
