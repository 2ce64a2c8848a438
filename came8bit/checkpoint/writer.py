"""Writes a checkpoint parameter by parameter: each state is read once and held one at a time."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .atomic import atomic_file
from .error import CheckpointError
from .header import (
    NO_DIGEST,
    Entry,
    Header,
    find_layout,
    header_bytes,
    label,
    place,
    reserved_bytes,
)
from .values import encode

CHUNK = 1 << 24
"""Bytes on their way from another device to the file at a time."""


def write_checkpoint(
    path: str | os.PathLike[str],
    groups: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    read: Callable[[int], Mapping[str, Tensor]],
    user: Mapping[str, str],
) -> int:
    """Write a checkpoint; what is at ``path`` is replaced when all has been written.

    Args:
        path: of the new file.
        groups: the options of every group, without parameters and names.
        entries: the parameters in order, without state.
        read: from the position of a parameter to its state, empty if there is none.  Called once
            for each, in order; the state is dropped before the next call.
        user: strings to keep beside it.

    Returns:
        Bytes of the file.

    Raises:
        CheckpointError: something cannot be stored; the message names it.
        OSError: the file cannot be written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian; this processor is not")
    groups = [
        {key: encode(value, f"group {index}: option {key!r}") for key, value in group.items()}
        for index, group in enumerate(groups)
    ]
    _check_user(user)
    size = reserved_bytes(Header(groups, entries, user))
    written: list[Entry] = []
    with atomic_file(path) as file:
        file.write(bytes(8 + size))
        begin = 0
        for position, entry in enumerate(entries):
            entry = _write_state(file.write, entry, position, begin, read)
            begin += entry.nbytes
            written.append(entry)
        # Only now all steps, places and checksums are known.
        header = Header(groups, written, user)
        digest = hashlib.sha256(header_bytes(header, size, NO_DIGEST)).hexdigest()
        file.seek(0)
        file.write(header_bytes(header, size, digest))
    return 8 + size + begin


def _write_state(
    write: Callable[[Any], object],
    entry: Entry,
    position: int,
    begin: int,
    read: Callable[[int], Mapping[str, Tensor]],
) -> Entry:
    """Write the tensors of one parameter and return what the header says of them."""
    state = read(position)
    if not state:
        return entry
    tensors = {name: value for name, value in state.items() if name not in ("step", "skipped")}
    found = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    layout = find_layout(entry.shape, found) if entry.shape is not None else None
    if layout is None or not {"step", "skipped"} <= set(state):
        raise CheckpointError(
            f"parameter {label(entry, position)} of shape {entry.shape} has state "
            f"{sorted(state)} of shapes {[shape for _, shape in found.values()]}, which came8bit "
            "does not keep for such a parameter; if its shape has changed, make a new optimizer"
        )
    spans = place(layout, begin)
    digest = hashlib.sha256()
    for name in spans:
        for piece in pieces(tensors[name]):
            digest.update(piece)
            write(piece)
    return replace(
        entry,
        step=int(state["step"]),
        skipped=int(state["skipped"]),
        sha256=digest.hexdigest(),
        tensors=spans,
    )


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in row-major order; on the CPU they are shared, not copied."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), CHUNK):
        yield flat[begin : begin + CHUNK].cpu().numpy().data


def _check_user(user: Mapping[str, str]) -> None:
    for key, value in user.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise CheckpointError(
                f"got metadata {key!r}: {value!r}, expected strings; use json.dumps for others"
            )
