"""From a file to a file, without an optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from ..optim import CAME
from ..state.layout import Layout, plan
from ..state_dict.merge import check_group
from ..state_dict.values import convert_momentum, momentum_error, with_momentum
from ..validation import ADDED_OPTIONS, CHOICES, FORMAT_VERSION
from .format import Entry, label, stored_bytes
from .load import FreedMemory
from .load import verify as read_all
from .reader import open_source
from .save import write_checkpoint


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert_checkpoint` did.

    Attributes:
        kind: of the file that was read: ``"came8bit"``, ``"state_dict"`` or ``"came-pytorch"``.
        parameters: how many there are.
        converted: names of those whose momentum is in other bits now.
        errors: ``{name: relative error}`` of the momentum of those that were rounded.
        faults: ``{name: what is wrong}`` of those whose state no optimizer continues; it is in the
            new file as it was, but that codes of 2 bits have 0 for NaN.
        bytes_read: size of the file that was read.
        bytes_written: size of the new one.
    """

    kind: str
    parameters: int
    converted: Sequence[str]
    errors: Mapping[str, float]
    faults: Mapping[str, str]
    bytes_read: int
    bytes_written: int


def convert_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, optim_bits: int | None = None
) -> ConvertReport:
    """Write what is in ``source`` to ``target`` with momentum in other bits.

    Small parameters, vectors and those that codes would not make smaller keep fp32 momentum, as in
    an optimizer with these ``optim_bits`` and the saved ``min_8bit_size``.

    Args:
        source: a checkpoint, or a file of ``torch.save`` with the ``state_dict()`` of an optimizer
            of this package or of came-pytorch. Options that the latter lacks get this package's
            defaults, and ``factored_view="last_two"``.
        target: of the new file; it may be ``source``. Written like
            :func:`~came8bit.save_checkpoint` does, parameter by parameter.
        optim_bits: of the momentum in all groups; ``None`` leaves them as they are.

    Raises:
        CheckpointError: ``source`` is damaged, foreign or newer. Nothing has been written.
        OSError: a file cannot be read or written.
    """
    if optim_bits is not None and optim_bits not in CHOICES["optim_bits"]:
        raise ValueError(f"got optim_bits {optim_bits!r}, expected one of {CHOICES['optim_bits']}")
    with open_source(source) as opened:
        if opened.strangers:
            raise CheckpointError(
                f"it has state for {listed(opened.strangers)}, which no group lists"
            )
        defaults = {} if opened.kind == "came8bit" else CAME([torch.empty(0)]).defaults
        groups: list[dict[str, Any]] = []
        for index, saved in enumerate(opened.groups):
            # In the saved order: what needs no conversion keeps its bytes.
            group = {**saved, **defaults, **ADDED_OPTIONS, **saved}
            group["format_version"] = FORMAT_VERSION
            group.setdefault("optim_bits", optim_bits)
            try:
                check_group(group, index)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            groups.append(group if optim_bits is None else {**group, "optim_bits": optim_bits})
        faults = read_all(opened)
        for place, entry in enumerate(opened.entries):
            if entry.step is not None and entry.layout is None:
                raise CheckpointError(
                    f"the codes of parameter {label(entry, place)} are packed, and a state dict "
                    "does not have its shape: load it into an optimizer and use save_checkpoint"
                )
        wanted = [
            _wanted(entry, groups[entry.group], opened.groups[entry.group])
            for entry in opened.entries
        ]
        freed = FreedMemory()
        errors: dict[str, float] = {}

        def read(position: int) -> dict[str, Tensor]:
            layout = wanted[position]
            if layout is None:
                return {}
            freed.add(layout.nbytes)  # what came before it
            try:
                state = opened.read(position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fspath(source)) from error
            made = convert_momentum(state, layout)
            if layout != opened.entries[position].layout and layout.momentum_bits != 32:
                name = label(opened.entries[position], position)
                errors[name] = momentum_error(state, made, layout.shape)
            return made

        entries = [
            replace(entry, step=None, skipped=0, sha256=None, tensors={})
            for entry in opened.entries
        ]
        state_bytes = sum(stored_bytes(layout) for layout in wanted if layout)
        written = write_checkpoint(target, groups, entries, read, opened.user, state_bytes)
        return ConvertReport(
            kind=opened.kind,
            parameters=len(entries),
            converted=[
                label(entry, place)
                for place, (entry, layout) in enumerate(zip(opened.entries, wanted, strict=True))
                if layout != entry.layout
            ],
            errors=errors,
            faults=_named(faults, opened.entries),
            bytes_read=opened.nbytes,
            bytes_written=written,
        )


def _wanted(entry: Entry, group: Mapping[str, Any], saved: Mapping[str, Any]) -> Layout | None:
    """Return the layout that ``entry`` gets under the options of ``group``; None without state."""
    layout = entry.layout
    if layout is None or entry.shape is None or group["optim_bits"] == saved.get("optim_bits"):
        return layout
    planned = plan(
        entry.shape,
        optim_bits=group["optim_bits"],
        min_8bit_size=group["min_8bit_size"],
        quantize_vectors=group.get("quantize_vectors", False),
    )
    return with_momentum(layout, planned.momentum_bits, entry.shape)


def _named(faults: Mapping[int, str | None], entries: Sequence[Entry]) -> dict[str, str]:
    return {label(entries[place], place): fault for place, fault in faults.items() if fault}


def inspect_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Describe a checkpoint or a state dict in a file of ``torch.save``; needs no model.

    Args:
        path: of the file.
        verify: read the tensors and compare their checksums; else the header's only.

    Returns:
        What JSON can hold (tensors as numbers, infinities as strings): ``kind``,
        ``format_version``, ``came8bit_version``, ``bytes``, ``state_bytes``, ``verified`` (``None``
        if it was not tried), ``damage`` (a sentence or ``None``), ``faults`` (what is wrong with
        the values of states that were read, by parameter), ``metadata``, ``groups`` (saved options
        and how many parameters), ``parameters`` (position, name, group, shape, dtype, step,
        skipped, momentum_bits, view, bytes).

    Raises:
        CheckpointError: not such a file, newer, truncated, or the header is damaged.
        OSError: it cannot be read.
    """
    with open_source(path) as source:
        damage, faults = None, {}
        if verify:
            try:
                faults = _named(read_all(source), source.entries)
            except CheckpointError as error:
                damage = str(error)
        members = [entry.group for entry in source.entries]
        return {
            "path": os.fspath(path),
            "kind": source.kind,
            "format_version": source.versions["format"],
            "came8bit_version": source.versions["came8bit"],
            "bytes": source.nbytes,
            "state_bytes": sum(entry.nbytes for entry in source.entries),
            "verified": damage is None if verify else None,
            "damage": damage,
            "faults": faults,
            "metadata": dict(source.user),
            "groups": [
                {"parameters": members.count(index), "options": _plain(dict(group))}
                for index, group in enumerate(source.groups)
            ],
            "parameters": [
                _parameter(entry, position) for position, entry in enumerate(source.entries)
            ],
        }


def _parameter(entry: Entry, position: int) -> dict[str, Any]:
    layout = entry.layout
    return {
        "position": position,
        "name": entry.name,
        "label": label(entry, position),
        "group": entry.group,
        "shape": None if entry.shape is None else list(entry.shape),
        "dtype": entry.dtype,
        "step": entry.step,
        "skipped": entry.skipped,
        "momentum_bits": layout and layout.momentum_bits,
        "factored": layout and layout.factored,
        "view": layout and list(layout.view),
        "bytes": entry.nbytes,
    }


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON has it; what it lacks is a string."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"a number of {value.bit_length()} bits"
    known = isinstance(value, (str, int)) or value is None
    known = known or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)
