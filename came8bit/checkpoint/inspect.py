"""What is in a file, as plain data."""

from __future__ import annotations

import math
import os
from typing import Any

from torch import Tensor

from .error import CheckpointError
from .header import Entry, label
from .opening import open_source


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
