"""From a file to a file, without an optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..optim import CAME
from ..state.layout import plan
from ..validation import ADDED_OPTIONS, CHOICES, FORMAT_VERSION, check_options
from .format import Entry, label
from .load import FreedMemory, convert_momentum
from .reader import open_source
from .save import write_checkpoint


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert_checkpoint` did.

    Attributes:
        kind: of the file that was read, ``"came8bit"`` or ``"came-pytorch"``.
        parameters: how many there are.
        converted: names of those whose momentum is in other bits now.
        bytes_read: size of the file that was read.
        bytes_written: size of the new one.
    """

    kind: str
    parameters: int
    converted: Sequence[str]
    bytes_read: int
    bytes_written: int


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    optim_bits: int | None = None,
) -> ConvertReport:
    """Write what is in ``source`` to ``target`` with momentum in other bits.

    Small parameters, vectors and those that codes would not make smaller keep fp32 momentum, as in
    an optimizer with these ``optim_bits`` and the saved ``min_8bit_size``.

    Args:
        source: a checkpoint, or a state dict of came-pytorch; the latter gets this package's
            defaults for options that came-pytorch lacks, and ``factored_view="last_two"``.
        target: of the new file; it may be ``source``.  Written like
            :func:`~came8bit.save_checkpoint` does, parameter by parameter.
        optim_bits: 8 or 32 for all groups; ``None`` leaves them as they are.

    Raises:
        CheckpointError: ``source`` is damaged, foreign or newer.  Nothing has been written.
        OSError: a file cannot be read or written.
    """
    if optim_bits is not None and optim_bits not in CHOICES["optim_bits"]:
        raise ValueError(f"got optim_bits {optim_bits!r}, expected one of {CHOICES['optim_bits']}")
    with open_source(source) as opened:
        defaults = CAME([torch.empty(0)]).defaults if opened.kind == "came-pytorch" else {}
        groups: list[dict[str, Any]] = []
        for index, saved in enumerate(opened.groups):
            group = {**defaults, **ADDED_OPTIONS, **saved, "format_version": FORMAT_VERSION}
            group["optim_bits"] = optim_bits or group.get("optim_bits")
            try:
                check_options(group)
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(f"{source}: group {index}: {error}") from error
            groups.append(group)
        opened.verify()
        converted: list[str] = []
        freed = FreedMemory()

        def read(position: int) -> dict[str, Tensor]:
            entry = opened.entries[position]
            layout, group = entry.layout, groups[entry.group]
            if layout is None or entry.shape is None:
                return {}
            freed.add(4 * math.prod(entry.shape))  # what came before it
            bits = layout.momentum_bits
            if group["optim_bits"] != opened.groups[entry.group]["optim_bits"]:
                bits = plan(
                    entry.shape,
                    optim_bits=group["optim_bits"],
                    min_8bit_size=group["min_8bit_size"],
                ).momentum_bits
            if bits != layout.momentum_bits:
                converted.append(label(entry, position))
            return convert_momentum(opened.read(position), bits)

        entries = [
            replace(entry, step=None, skipped=0, sha256=None, tensors={})
            for entry in opened.entries
        ]
        written = write_checkpoint(target, groups, entries, read, opened.user)
        return ConvertReport(opened.kind, len(entries), converted, opened.nbytes, written)


def inspect_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Describe a checkpoint, or a state dict of came-pytorch; changes nothing, needs no model.

    Args:
        path: of the file.
        verify: read the tensors and compare their checksums; else the header's only.

    Returns:
        What JSON can hold (tensors as numbers, infinities as strings): ``kind``,
        ``format_version``, ``came8bit_version``, ``bytes``, ``state_bytes``, ``verified`` (``None``
        if it was not tried), ``damage`` (a sentence or ``None``), ``metadata``, ``groups`` (saved
        options and how many parameters), ``parameters`` (position, name, group, shape, dtype, step,
        skipped, momentum_bits, view, bytes).

    Raises:
        CheckpointError: not such a file, newer, truncated, or the header is damaged.
        OSError: it cannot be read.
    """
    with open_source(path) as source:
        damage = None
        if verify:
            try:
                source.verify()
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
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
