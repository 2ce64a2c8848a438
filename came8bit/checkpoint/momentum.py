"""Momentum from fp32 to codes and back, a few slices at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._ops import dequantize_blockwise, quantize_blockwise
from ..quant import absmax_shape, slice_shape

_ELEMENTS = 1 << 20


def momentum_bits(state: Mapping[str, Tensor]) -> int:
    """8 or 32, of a state that is not empty."""
    return 8 if "absmax" in state else 32


def convert_momentum(state: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """``state`` with its momentum in ``bits``; everything else is passed on as it is.

    From 8 to 32 bits is exact, and back from there too.  From 32 to 8 rounds to the nearest code,
    as the step does.  Blocks never cross a slice of the first dimension, so working slice by slice
    gives what the whole tensor would.

    Args:
        state: of one parameter.
        bits: 8 or 32.
    """
    if momentum_bits(state) == bits:
        return state
    momentum = state["exp_avg"]
    slices, slice_len = slice_shape(momentum.shape)
    rows = max(1, _ELEMENTS // max(1, slice_len))
    rest = {name: value for name, value in state.items() if name not in ("exp_avg", "absmax")}
    if bits == 32:
        full = torch.empty(momentum.shape, dtype=torch.float32)
        for first in range(0, slices, rows):
            part = slice(first, first + rows)
            full[part] = dequantize_blockwise(momentum[part], state["absmax"][part])
        return {"exp_avg": full, **rest}
    codes = torch.empty(momentum.shape, dtype=torch.int8)
    absmax = torch.empty(absmax_shape(momentum.shape), dtype=torch.float32)
    for first in range(0, slices, rows):
        part = slice(first, first + rows)
        codes[part], absmax[part] = quantize_blockwise(momentum[part])
    return {"exp_avg": codes, "absmax": absmax, **rest}
