"""The values of saved state: counts, faults, and momentum in other bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..ops.schema import dequantize_blockwise, quantize_blockwise
from ..reference.quant import NAN_CODE, slice_shape
from ..reference.rungs import RUNGS, Momentum, Rung, has_nan, rung_of
from ..state.layout import Layout, possible_layouts

COUNTERS = ("step", "skipped")
"""Buffers that are whole numbers and no tensors of a file."""

_MOMENTUM = ("exp_avg", "absmax", "scales")
_LARGEST_COUNT = 2**53  # no run has more steps, and float64 has each smaller one
_ELEMENTS = 1 << 20  # of momentum that are converted at a time


def as_count(value: object, name: str) -> int:
    """Return ``value`` as a count: a whole number, also as a float or a 0-D tensor.

    Raises:
        ValueError: it is not one, or larger than any run makes it.
    """
    got = value
    if isinstance(value, Tensor) and value.shape == () and not value.is_complex():
        value = value.item()
    if isinstance(value, (Integral, Real)) and not isinstance(value, bool):
        number = float(value) if not isinstance(value, Integral) else int(value)
        if 0 <= number < _LARGEST_COUNT and number == int(number):
            return int(number)
    shown = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
    shown = repr(value) if isinstance(value, (int, float)) else shown
    raise ValueError(f"got {name} = {shown[:80]}, expected a count")


def find_fault(state: Mapping[str, Any]) -> str | None:
    """Say what makes a state one that no step can go on from, or return ``None``.

    Statistics are means of squares and scales are magnitudes: finite and not negative. Momentum
    is finite.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or not value.numel() or name in COUNTERS:
            continue
        if value.dtype == torch.int8:
            if bool((value == NAN_CODE).any()):
                return f"{name} has codes of NaN"
        elif value.dtype == torch.uint8:
            if has_nan(value, state.get("scales")):
                return f"{name} has codes of NaN"
        elif value.is_floating_point():
            low, high = (float(bound) for bound in torch.aminmax(value.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{name} has " + ("NaN" if math.isnan(low) else "infinite values")
            if low < 0 and name != "exp_avg":
                return f"{name} has negative values"
    return None


def convert_momentum(state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return ``state`` with its momentum as ``layout`` has it; the rest is passed on as it is.

    From any rung to 32 bits is exact, and back from there too. Otherwise values are rounded as the
    step rounds them; what a coarse code does not remember is lost, as no parameter moves here.
    Blocks never cross a slice of the first dimension, so working slice by slice gives what the
    whole tensor would.
    """
    codes, scales = state["exp_avg"], state.get("absmax", state.get("scales"))
    source, target = rung_of(codes, scales), RUNGS.get(layout.momentum_bits)
    if source is target:
        return dict(state)
    rest = {name: value for name, value in state.items() if name not in _MOMENTUM}
    made = {
        buffer.name: torch.empty(buffer.shape, dtype=buffer.dtype, device=codes.device)
        for buffer in layout.buffers
        if buffer.name in _MOMENTUM
    }
    for part, m in _decoded(state, layout.shape, _ELEMENTS):
        if target is None:
            made["exp_avg"][part] = m
        else:
            made["exp_avg"][part], made[target.scales_name][part] = _encode(m, target)
    return {**made, **rest}


def momentum_error(
    before: Mapping[str, Any], after: Mapping[str, Any], shape: Sequence[int]
) -> float:
    """Return what converting the momentum has changed, relative to its norm."""
    lost = total = 0.0
    pairs = zip(
        *(_decoded(state, shape, _ELEMENTS // 16) for state in (before, after)), strict=True
    )
    for (_, old), (_, new) in pairs:
        total += float(old.norm()) ** 2
        lost += float((new - old).norm()) ** 2
    return math.sqrt(lost / total) if total else 0.0


def _decoded(
    state: Mapping[str, Any], shape: Sequence[int], elements: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield fp32 momentum, a few slices of the first dimension at a time."""
    codes, scales = state["exp_avg"], state.get("absmax", state.get("scales"))
    slices, slice_len = slice_shape(tuple(shape))
    rows = max(1, elements // max(1, slice_len))
    for first in range(0, slices, rows):
        part = slice(first, first + rows)
        part_shape = (min(rows, slices - first), *shape[1:])
        yield part, _decode(codes[part], None if scales is None else scales[part], part_shape)


def _decode(codes: Tensor, scales: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return fp32 momentum of ``shape``, from the kernel where there is one."""
    if scales is not None and codes.dtype == torch.int8:
        values: Tensor = dequantize_blockwise(codes, scales)
        return values
    return Momentum(codes, scales, shape).load()


def _encode(m: Tensor, rung: Rung) -> tuple[Tensor, Tensor]:
    if rung.bits == 8:
        codes, scales = quantize_blockwise(m)
        return codes, scales
    return rung.encode(m, torch.zeros(m.shape, dtype=torch.bool, device=m.device))


def with_momentum(layout: Layout, bits: int, shape: Sequence[int]) -> Layout:
    """Return the layout that has the statistics of ``layout`` and momentum in ``bits``."""
    if layout.momentum_bits == bits:
        return layout
    return next(
        other
        for other in possible_layouts(shape)
        if (other.view, other.factored, other.momentum_bits) == (layout.view, layout.factored, bits)
    )
