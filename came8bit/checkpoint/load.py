"""From a file to an optimizer."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.schema import dequantize_blockwise, quantize_blockwise
from ..optim import CAME
from ..reference.quant import absmax_shape, slice_shape
from .format import label
from .match import OWN_OPTIONS, Match, Pair, dtype_changes, listed, match, same_option
from .reader import Source, open_source
from .save import check_optimizer


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did; ``str()`` says it in sentences.

    Attributes:
        path: of the file.
        kind: ``"came8bit"``, or ``"came-pytorch"`` for imported state.
        matched_by: ``"name"`` or ``"position"``.
        loaded: parameters that have state now.
        without_state: parameters that have none, because they had none in the file.
        converted: ``{"32 to 8 bits": names}`` of the parameters whose momentum was converted.
        moved: names of parameters whose position is not the saved one.
        dtypes: parameters whose dtype is not the saved one.
        options: per group what changed, ``{option: (before, after)}``.
        metadata: the strings that were saved beside the state.
        wrappers: what wrappers had put into the names of one side, ``module.`` or ``_orig_mod.``,
            and was left out to compare them.
        unsure: parameters that have a name in the file and the shape of another, so that only the
            order told them apart: the optimizer has no names.
    """

    path: str
    kind: str
    matched_by: str
    loaded: int
    without_state: int
    converted: Mapping[str, Sequence[str]] = field(default_factory=dict)
    moved: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    options: Sequence[Mapping[str, tuple[Any, Any]]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()

    def __str__(self) -> str:
        first = f"{self.path} ({self.kind}): state of {self.loaded} parameters by {self.matched_by}"
        rest = f" without {' and '.join(self.wrappers)}" if self.wrappers else ""
        rest += f", {self.without_state} without state" if self.without_state else ""
        return "; ".join([first + rest, *self.remarks()])

    def remarks(self) -> list[str]:
        """What is no longer as it was saved, or may not be."""
        remarks = [
            f"momentum of {len(names)} parameters converted from {what}"
            for what, names in self.converted.items()
        ]
        if self.moved:
            remarks.append(
                f"{len(self.moved)} parameters are at another position than they were, so "
                "stochastic rounding draws other bits for them"
            )
        if self.dtypes:
            remarks.append(f"{len(self.dtypes)} parameters have another dtype than they had")
        if self.unsure:
            remarks.append(
                f"the file has names, the optimizer no unique ones: {len(self.unsure)} parameters "
                f"have the shape of another one ({listed(self.unsure)}) and were told apart by "
                "their order, so another order than the saved one swaps their state; make the "
                "optimizer over model.named_parameters() to have the names compared"
            )
        return remarks


def load_checkpoint(optimizer: CAME, path: str | os.PathLike[str]) -> LoadReport:
    """Continue from a file that :func:`~came8bit.save_checkpoint` wrote.

    Parameters are matched by name where both sides have names (``named_parameters()``), else by
    position.  What ``DistributedDataParallel``, ``torch.compile`` and other wrappers put into names
    does not count.  Saved options win, those that are not saved stay, as in ``load_state_dict``;
    but ``optim_bits`` stays the optimizer's own, and momentum is converted if it was saved in
    another.  Load the model first: it is not in the file.

    A file that ``torch.save`` wrote with the ``state_dict()`` of ``came_pytorch.CAME`` can be
    loaded, too; where that factors another view of a parameter than this optimizer, it is refused.

    The whole file is read and its checksums are compared before anything changes; then the state
    is replaced parameter by parameter, which needs memory for one of them.  Hooks of
    ``load_state_dict`` do not run.

    Args:
        optimizer: one of this package's, over the model that was saved.
        path: of the file.

    Returns:
        What was done.  A :class:`UserWarning` tells of conversions, of parameters that have changed
        their position or dtype, and of those that could have been swapped without notice.

    Raises:
        CheckpointError: the file is damaged, truncated, foreign, newer or for other parameters; a
            :class:`ValueError`.  Nothing has changed.
        OSError: the file cannot be read.  Nothing has changed.
        RuntimeError: something failed in the middle of replacing, such as memory; the message says
            what has changed.
    """
    check_optimizer(optimizer, "load_checkpoint")
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.is_meta or hasattr(param, "placements"):
                raise NotImplementedError(
                    f"load_checkpoint: a parameter is a {type(param).__name__} on {param.device}; "
                    "meta and sharded (DTensor) parameters are not supported"
                )
    with open_source(path) as source:
        try:
            found = match(optimizer.param_groups, source)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; nothing has been changed") from error
        source.verify()
        report = _report(optimizer, os.fspath(path), source, found)
        _replace(optimizer, source, found, os.fspath(path))
    if report.remarks():
        text = "; ".join(report.remarks())
        warnings.warn(f"load_checkpoint: {path}: {text}", UserWarning, stacklevel=2)
    return report


def _replace(optimizer: CAME, source: Source, found: Match, path: str) -> None:
    """Change the optimizer; everything that can be refused has been."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, merged in zip(optimizer.param_groups, found.groups, strict=True):
        group.update(merged)
    done, freed = 0, FreedMemory()
    try:
        optimizer._store.reserve(optimizer.param_groups)
        for pair in found.pairs:
            _replace_one(optimizer, source, pair)
            freed.add(4 * pair.param.numel())
            done += 1
    except Exception as error:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(old)
        state = "nothing has been changed"
        if done:
            state = (
                f"the state of {done} of {len(found.pairs)} parameters has been replaced, so load "
                "again or make a new optimizer before the next step"
            )
        raise RuntimeError(
            f"{path}: loading failed ({type(error).__name__}: {error}); {state}"
        ) from error
    optimizer._state_replaced()


def _replace_one(optimizer: CAME, source: Source, pair: Pair) -> None:
    state = source.read(pair.saved)
    if pair.bits is not None:
        state = convert_momentum(state, pair.bits)
        device = pair.param.device
        state = {name: tensor.to(device) for name, tensor in state.items()}
    elif not optimizer._store.read(pair.param):
        return
    optimizer._store.write(pair.param, state)


def _report(optimizer: CAME, path: str, source: Source, found: Match) -> LoadReport:
    converted: dict[str, list[str]] = {}
    moved = []
    for pair in found.pairs:
        entry = source.entries[pair.saved]
        name = label(entry, pair.position)
        layout = entry.layout
        if layout is None:
            continue
        if layout.momentum_bits != pair.bits:
            what = f"{layout.momentum_bits} to {pair.bits} bits"
            converted.setdefault(what, []).append(name)
        if pair.position != pair.saved:
            moved.append(name)
    options = []
    for own, new in zip(optimizer.param_groups, found.groups, strict=True):
        changes = {
            key: (own.get(key), value)
            for key, value in new.items()
            if key not in OWN_OPTIONS and not (key in own and same_option(own[key], value))
        }
        options.append(changes)
    loaded = sum(pair.bits is not None for pair in found.pairs)
    return LoadReport(
        path=path,
        kind=source.kind,
        matched_by="name" if found.by_name else "position",
        loaded=loaded,
        without_state=len(found.pairs) - loaded,
        converted=converted,
        moved=moved,
        dtypes=dtype_changes(found.pairs, source.entries),
        options=options,
        metadata=dict(source.user),
        wrappers=found.wrappers,
        unsure=found.unsure,
    )


_EVERY = 1 << 22


def _find_trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class FreedMemory:
    """Counts what has been freed and returns it every 4 MiB; does nothing outside glibc.

    glibc keeps freed blocks of up to 32 MiB in its heap, and a new tensor, which is aligned, does
    not fit into the hole that one of the same size has left.  Replacing a state tensor by tensor
    would then take as much memory again, although each old tensor is freed at once.
    """

    def __init__(self) -> None:
        self._trim = _find_trim()
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        """Note that ``nbytes`` have been freed."""
        self._bytes += nbytes
        if self._bytes >= _EVERY and self._trim is not None:
            self._trim(0)
            self._bytes = 0


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
