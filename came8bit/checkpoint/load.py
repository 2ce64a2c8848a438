"""From a file to an optimizer."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError, listed, printable
from ..optim import CAME
from ..state.layout import find_fault, plan
from ..state_dict.merge import OWN_OPTIONS, Merge, Pair, SavedParameter, merge, same_option
from ..state_dict.values import Differences, convert_momentum
from ..validation import ADDED_OPTIONS
from .format import Entry, dtype_name
from .reader import Source, open_source
from .save import check_optimizer


@dataclass(frozen=True, kw_only=True)
class LoadReport(Differences):
    """What :func:`load_checkpoint` did; ``str()`` says it in sentences.

    Attributes:
        path: of the file.
        kind: ``"came8bit"``; for files of ``torch.save``, ``"state_dict"`` for a state dict of this
            package and ``"came-pytorch"`` for one of that.
        loaded: parameters that have state now.
        without_state: parameters that have none, because they had none in the file.
        dtypes: parameters whose dtype is not the saved one.
        options: per group what changed, ``{option: (before, after)}``.
        metadata: the strings that were saved beside the state.
    """

    path: str
    kind: str
    loaded: int
    without_state: int
    dtypes: Sequence[str] = ()
    options: Sequence[Mapping[str, tuple[Any, Any]]] = ()
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        first = f"{self.path} ({self.kind}): state of {self.loaded} parameters by {self.matched_by}"
        rest = f" without {' and '.join(self.wrappers)}" if self.wrappers else ""
        rest += f", {self.without_state} without state" if self.without_state else ""
        return printable("; ".join([first + rest, *self.remarks()]))

    def remarks(self) -> list[str]:
        """Return a sentence for each difference that changes what training does."""
        dtypes = [f"{len(self.dtypes)} parameters have another dtype than they had"]
        return super().remarks() + (dtypes if self.dtypes else [])


def load_checkpoint(
    optimizer: CAME,
    path: str | os.PathLike[str],
    *,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> LoadReport:
    """Continue from a file that :func:`~came8bit.save_checkpoint` wrote.

    Parameters are matched by name where both sides have names (``named_parameters()``), else by
    position. What ``DistributedDataParallel``, ``torch.compile`` and other wrappers put into names
    does not count. Saved options win, those that are not saved stay, as in ``load_state_dict``;
    but ``optim_bits`` stays the optimizer's own, and momentum is converted if it was saved in
    another. Load the model first: it is not in the file.

    A file that ``torch.save`` wrote with the ``state_dict()`` of an optimizer of this package or of
    ``came_pytorch.CAME`` can be loaded, too; where the latter factors another view of a parameter
    than this optimizer, it is refused.

    The whole file is read and its checksums are compared before anything changes; then the state
    is replaced parameter by parameter, which needs memory for one of them. Every rank of a sharded
    model reads the file and keeps its part. Hooks of ``load_state_dict`` do not run.

    Args:
        optimizer: one of this package's, over the model that was saved.
        path: of the file.
        allow_missing: let parameters that the file does not have, or has in another shape, or
            whose saved state cannot be continued, start without state. Needs names on both sides.
        allow_unused: leave out what the file has for parameters that the optimizer does not have.

    Returns:
        What was done. A :class:`UserWarning` tells of conversions, of parameters that have changed
        their position or dtype, of what was left out, and of those that could have been swapped
        without notice.

    Raises:
        CheckpointError: the file is damaged, truncated, foreign, newer or for other parameters; a
            :class:`ValueError`. Nothing has changed.
        OSError: the file cannot be read. Nothing has changed.
        RuntimeError: something failed in the middle of replacing, such as memory; the message says
            what has changed.
    """
    check_optimizer(optimizer, "load_checkpoint")
    with open_source(path) as source:
        try:
            found = _match(optimizer, source, allow_missing, allow_unused)
            found = found.without_faults(verify(source), allow_missing)
        except ValueError as error:
            raise CheckpointError(f"{error}; nothing has been changed") from error
        for pair in found.pairs:
            if pair.param.is_meta and pair.wanted is not None:
                raise NotImplementedError(
                    f"load_checkpoint: {pair.label} is on {pair.param.device} and cannot have the "
                    "state that the file has for it; use to_empty() first"
                )
        report = _report(optimizer, os.fsdecode(path), source, found)
        _replace(optimizer, source, found)
    if report.remarks():
        text = printable(f"load_checkpoint: {path}: {'; '.join(report.remarks())}")
        warnings.warn(text, UserWarning, stacklevel=2)
    return report


def _match(optimizer: CAME, source: Source, allow_missing: bool, allow_unused: bool) -> Merge:
    """Decide what will be loaded; raise a :class:`ValueError` if the file does not fit."""
    if source.strangers and not allow_unused:
        raise ValueError(
            f"the file has state for {listed(source.strangers)}, which no group lists; "
            "allow_unused=True leaves it out"
        )
    # What came-pytorch does is not its user's choice: it is refused below or makes no difference.
    official = source.kind == "came-pytorch"
    found = merge(
        optimizer.param_groups,
        source.groups,
        list(map(_saved_parameter, source.entries)),
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        kept=OWN_OPTIONS | ({"factored_view", *ADDED_OPTIONS} if official else set()),
    )
    if official:
        _check_views(found)
    unused = [*found.differences.unused, *source.strangers]
    return replace(found, differences=replace(found.differences, unused=unused))


def _saved_parameter(entry: Entry) -> SavedParameter:
    """Return what the merge wants to know; a parameter tells the layout where the file does not."""
    state: dict[str, Any] = {}
    if entry.step is not None and entry.layout is None:
        state = {
            name: torch.empty(span.shape, dtype=span.dtype, device="meta")
            for name, span in entry.tensors.items()
        }
        state.update(step=entry.step, skipped=entry.skipped)
    return SavedParameter(entry.name, entry.group, entry.shape, entry.layout, state)


def _check_views(found: Merge) -> None:
    """Refuse statistics of another view: came-pytorch factors the last two dimensions."""
    members = [group for group in found.groups for _ in group["params"]]
    other = []
    for pair, group in zip(found.pairs, members, strict=True):
        shape = tuple(pair.param.shape)
        own = plan(shape, factored_view=group["factored_view"])
        if pair.layout and own.buffers != plan(shape, factored_view="last_two").buffers:
            other.append(f"{pair.label} {shape}")
    if other:
        raise ValueError(
            f"came-pytorch factors the last two dimensions, this optimizer chooses another view "
            f"for {listed(other)}, and the statistics of one cannot be made from the other's; "
            'construct the optimizer with factored_view="last_two"'
        )


def _replace(optimizer: CAME, source: Source, found: Merge) -> None:
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
        raise RuntimeError(f"loading failed ({type(error).__name__}: {error}); {state}") from error
    optimizer._state_replaced()


def _replace_one(optimizer: CAME, source: Source, pair: Pair) -> None:
    if pair.saved is not None and pair.wanted is not None:
        state = convert_momentum(source.read(pair.saved), pair.wanted)
        device = pair.param.device
        state = {name: tensor.to(device) for name, tensor in state.items()}
        optimizer._store.write(pair.param, state)
    elif optimizer._store.read(pair.param):
        optimizer._store.write(pair.param, {})


def _report(optimizer: CAME, path: str, source: Source, found: Merge) -> LoadReport:
    options = []
    for own, new in zip(optimizer.param_groups, found.groups, strict=True):
        changes = {
            key: (own.get(key), value)
            for key, value in new.items()
            if key not in OWN_OPTIONS and not (key in own and same_option(own[key], value))
        }
        options.append(changes)
    loaded = sum(pair.wanted is not None for pair in found.pairs)
    return LoadReport(
        **vars(found.differences),
        path=path,
        kind=source.kind,
        loaded=loaded,
        without_state=len(found.pairs) - loaded,
        dtypes=_dtype_changes(found.pairs, source.entries),
        options=options,
        metadata=dict(source.user),
    )


def _dtype_changes(pairs: Sequence[Pair], entries: Sequence[Entry]) -> list[str]:
    """Return the parameters whose dtype is no longer the one that was saved."""
    found = []
    for pair in pairs:
        saved = None if pair.saved is None else entries[pair.saved].dtype
        now = dtype_name(pair.param.dtype)
        if saved not in (None, now):
            found.append(f"{pair.label}: {saved} -> {now}")
    return found


def verify(source: Source) -> dict[int, str | None]:
    """Read everything once.

    Returns:
        For each parameter what is wrong with the values of its state, see
        :func:`~..state.layout.find_fault`.

    Raises:
        CheckpointError: a checksum is wrong.
    """
    freed, faults = FreedMemory(), {}
    for position, entry in enumerate(source.entries):
        faults[position] = find_fault(source.read(position))
        freed.add(entry.nbytes)
    return faults


_EVERY = 1 << 22


def _find_trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class FreedMemory:
    """Counts what has been freed and returns it every 4 MiB; does nothing outside glibc.

    glibc keeps freed blocks of up to 32 MiB in its heap, and a new tensor, which is aligned, does
    not fit into the hole that one of the same size has left. Replacing a state tensor by tensor
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
