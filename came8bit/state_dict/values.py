"""Saved state in parts: names, counts, faults, momentum in other bits, what loading has changed.

Wrappers put words of their own into the names of what they wrap: a model that was saved under
``DistributedDataParallel`` or ``torch.compile`` has other names than the bare one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import listed
from ..ops.schema import dequantize_blockwise, quantize_blockwise
from ..reference.quant import slice_shape
from ..reference.rungs import RUNGS, Momentum, Rung, rung_of
from ..state.layout import Layout, possible_layouts

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


#: In front of everything: DistributedDataParallel, DataParallel, AveragedModel.
_IN_FRONT = "module"
#: Anywhere: torch.compile, FSDP, activation checkpointing of torch.distributed.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the names of all parameters in order; ``None`` without names that are unique."""
    names: list[Any] = []
    for group in groups:
        own = group.get("param_names")
        if not isinstance(own, (list, tuple)) or len(own) != len(group["params"]):
            return None
        names += own
    return names if all(isinstance(n, str) for n in names) and _unique(names) else None


def order_of(
    own: Sequence[str],
    saved: Sequence[str],
    *,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> tuple[list[int | None], list[str]]:
    """Find the position in ``saved`` of each of ``own``.

    Names are compared as they are first, so that a model that has a ``module`` of its own is not
    taken for a wrapped one.

    Args:
        own: names of the optimizer's parameters.
        saved: names of the saved ones.
        allow_missing: whether some of ``own`` may be missing in ``saved``: ``None`` stands for it.
        allow_unused: whether some of ``saved`` may be left over.

    Returns:
        The positions, and the wrappers' words that had to be left out of the names.

    Raises:
        ValueError: the names differ; the message lists those that do.
    """
    compared, wrappers = (own, saved), []
    if set(own) != set(saved):
        (bare_own, own_words), (bare_saved, saved_words) = map(_without_wrappers, (own, saved))
        if _unique(bare_own) and _unique(bare_saved):
            common = len(set(bare_own) & set(bare_saved))
            if common > len(set(own) & set(saved)):
                compared = (bare_own, bare_saved)
                wrappers = sorted(own_words ^ saved_words or own_words | saved_words)
    where = {name: position for position, name in enumerate(compared[1])}
    order = [where.get(name) for name in compared[0]]
    used = {position for position in order if position is not None}
    missing = [name for name, position in zip(own, order, strict=True) if position is None]
    unused = [name for position, name in enumerate(saved) if position not in used]
    refused = (missing and not allow_missing) or (unused and not allow_unused)
    nothing = own and saved and not used
    if refused or nothing:
        otherwise = ", or pass allow_missing=True or allow_unused=True to load what both have"
        raise ValueError(
            "the saved state is for other parameters: "
            f"not saved: {listed(missing)}; not in the optimizer: {listed(unused)}. Build the "
            "optimizer over the model that was saved" + ("" if nothing else otherwise)
        )
    return order, wrappers


def _without_wrappers(names: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return ``names`` without what wrappers put into them, and what that was."""
    words = [name.split(".") for name in names]
    found = {f"{word}." for name in words for word in name[:-1] if word in _ANYWHERE}
    words = [[word for word in name[:-1] if word not in _ANYWHERE] + name[-1:] for name in words]
    # This one is around the whole model, so it is in front of all names or a word of the model.
    while words and all(len(name) > 1 and name[0] == _IN_FRONT for name in words):
        found.add(f"{_IN_FRONT}.")
        words = [name[1:] for name in words]
    return [".".join(name) for name in words], found


def _unique(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What is not as it was saved after loading.

    Attributes:
        matched_by: ``"name"`` or ``"position"``.
        converted: ``{"32 to 8 bits": names}`` of the parameters whose momentum was converted.
        moved: names of parameters whose position is not the saved one.
        wrappers: what wrappers had put into the names of one side, ``module.`` or ``_orig_mod.``,
            and was left out to compare them.
        unsure: parameters that have a name in the file and the shape of another, so that only the
            order told them apart: the optimizer has no names.
        renamed: parameters of a state dict that have other names there, so that the order decided.
        missing: parameters without usable saved state, which start from zero (``allow_missing``).
        unused: what was saved and belongs to no parameter (``allow_unused=True``).
        not_finite: parameters whose state has NaN or infinity, under ``nonfinite="propagate"``.
    """

    matched_by: str
    converted: Mapping[str, Sequence[str]] = field(default_factory=dict)
    moved: Sequence[str] = ()
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()
    renamed: Sequence[str] = ()
    missing: Sequence[str] = ()
    unused: Sequence[str] = ()
    not_finite: Sequence[str] = ()

    def remarks(self) -> list[str]:
        """Return a sentence for each difference that changes what training does."""
        remarks = [
            f"momentum of {len(names)} parameters converted from {what}"
            for what, names in self.converted.items()
        ]
        if self.moved:
            remarks.append(
                f"{len(self.moved)} parameters are at another position than they were, so "
                "stochastic rounding draws other bits for them"
            )
        if self.unsure:
            remarks.append(
                f"the saved state has names, the optimizer no unique ones: {len(self.unsure)} "
                f"parameters have the shape of another one ({listed(self.unsure)}) and were told "
                "apart by their order; make the optimizer over model.named_parameters() to have "
                "the names compared"
            )
        if self.renamed:
            remarks.append(
                f"{len(self.renamed)} parameters were told apart by their order, because they have "
                f"other names in the saved state ({listed(self.renamed)})"
            )
        if self.missing:
            remarks.append(
                f"{len(self.missing)} parameters start without state ({listed(self.missing)})"
            )
        if self.unused:
            remarks.append(f"{len(self.unused)} saved ones were left out ({listed(self.unused)})")
        if self.not_finite:
            remarks.append(f"the state of {listed(self.not_finite)} is not finite")
        return remarks
