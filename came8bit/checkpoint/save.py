"""From an optimizer to a file."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..atomic_file import atomic_file
from ..errors import CheckpointError
from ..optim import CAME
from ..state.layout import plan_state
from ..state.sharding import full, is_first, mesh_of, sum_over
from ..state_dict.values import names_of
from ..validation import FORMAT_VERSION
from .format import (
    NO_DIGEST,
    Entry,
    Header,
    dtype_name,
    encode,
    find_layout,
    header_bytes,
    label,
    place,
    reserved_bytes,
    stored_bytes,
)


def save_checkpoint(
    optimizer: CAME, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> int:
    """Write options and state of ``optimizer`` to a safetensors file.

    When it returns, the file is complete and on the disk. Until then, whatever happens, ``path``
    is what it was before. The state is written parameter by parameter; beyond it, memory is needed
    for one parameter whose state is paged or on another device, and for next to nothing otherwise.
    The model is not in the file: save it beside. With replicas, save on one of them. With sharded
    parameters (FSDP2) all ranks have to call this: they gather one parameter after another, and the
    first one writes.

    Args:
        optimizer: one of this package's.
        path: of the new file. A temporary file is made in the same folder, and those that dead
            writers have left there are removed.
        metadata: strings to keep in the file, such as an epoch; loading returns them.

    Returns:
        Bytes of the file.

    Raises:
        CheckpointError: an option cannot be stored, or a state is not the optimizer's own.
        OSError: the folder is missing, the disk is full, ...; ``path`` is what it was.
    """
    check_optimizer(optimizer, "save_checkpoint")
    names = names_of(optimizer.param_groups)
    params: list[Tensor] = []
    entries: list[Entry] = []
    groups: list[dict[str, Any]] = []
    state_bytes = 0
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            name = None if names is None else names[len(params)]
            entries.append(Entry(name, index, tuple(param.shape), dtype_name(param.dtype)))
            params.append(param)
            if optimizer.state.get(param):
                state_bytes += stored_bytes(plan_state(param, group))
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({**options, "format_version": FORMAT_VERSION})

    def read(position: int) -> dict[str, Tensor]:
        state = optimizer._store.read(params[position])
        return {name: full(tensor) for name, tensor in state.items()}

    def write(read: Callable[[int], Mapping[str, Tensor]]) -> int:
        return write_checkpoint(path, groups, entries, read, metadata or {}, state_bytes)

    mesh = mesh_of(params)
    return write(read) if mesh is None else _write_together(mesh, read, len(params), write)


def _write_together(
    mesh: Any,
    read: Callable[[int], Mapping[str, Tensor]],
    count: int,
    write: Callable[[Callable[[int], Mapping[str, Tensor]]], int],
) -> int:
    """Let the first rank ``write`` while all ranks ``read``; return the bytes on each.

    A rank that stopped reading would leave the others waiting: so it reads to the end.
    """
    rest = iter(range(count))
    error: BaseException | None = None
    size = 0
    if is_first(mesh):
        try:
            size = write(lambda position: read(next(rest)))
        except Exception as caught:
            error = caught
    for position in rest:
        read(position)
    (size,) = sum_over(mesh, [-1 if error else size])
    if error:
        raise error
    if size < 0:
        raise OSError("save_checkpoint: the first rank could not write; see its error")
    return size


def check_optimizer(optimizer: object, function: str) -> None:
    """Raise a :class:`TypeError` for what is not an optimizer of this package."""
    if isinstance(optimizer, CAME):
        return
    inner = getattr(optimizer, "optimizer", None)
    cure = "pass optimizer.optimizer, which is one" if isinstance(inner, CAME) else "pass that"
    raise TypeError(
        f"{function}: got a {type(optimizer).__name__}, expected an optimizer of came8bit; {cure}"
    )


CHUNK = 1 << 24
"""Bytes on their way from another device to the file at a time."""


def write_checkpoint(
    path: str | os.PathLike[str],
    groups: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    read: Callable[[int], Mapping[str, Tensor]],
    user: Mapping[str, str],
    state_bytes: int,
) -> int:
    """Write a checkpoint; what is at ``path`` is replaced when all has been written.

    Args:
        path: of the new file.
        groups: the options of every group, without parameters and names.
        entries: the parameters in order, without state.
        read: from the position of a parameter to its state, empty if there is none. Called once
            for each, in order; the state is dropped before the next call.
        user: strings to keep beside it.
        state_bytes: of all tensors together, for the error of a full disk.

    Returns:
        Bytes of the file.

    Raises:
        CheckpointError: something cannot be stored; the message names it.
        OSError: the file cannot be written.
    """
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are little-endian; this processor is not")
    groups = [_encode_group(group, index) for index, group in enumerate(groups)]
    _check_user(user)
    size = reserved_bytes(Header(groups, entries, user))
    written: list[Entry] = []
    with atomic_file(path, 8 + size + state_bytes) as file:
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


def _encode_group(group: Mapping[Any, Any], index: int) -> dict[str, Any]:
    for key in group:
        if not isinstance(key, str):  # JSON would write a number as a string
            raise CheckpointError(
                f"group {index}: got an option called {key!r}, expected a string; remove it from "
                "the parameter group"
            )
    return {key: encode(value, f"group {index}: option {key!r}") for key, value in group.items()}


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
    """Return the bytes of ``tensor`` in row-major order; on the CPU they are shared, not copied."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), CHUNK):
        yield flat[begin : begin + CHUNK].cpu().numpy().data


def _check_user(user: Mapping[str, str]) -> None:
    for key, value in user.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise CheckpointError(
                f"got metadata {key!r}: {value!r}, expected strings; use json.dumps for others"
            )
