"""A file that state can be loaded from, and the kind that :mod:`.save` writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, printable
from ..state.layout import possible_layouts
from ..state_dict.merge import check_versions
from ..validation import PARAM_DTYPES
from .archive import MAGIC, explained
from .format import (
    DTYPE_NAMES,
    FILE_VERSION,
    FORMAT,
    LARGEST_HEADER,
    NO_DIGEST,
    Entry,
    Header,
    Span,
    decode,
    dtype_name,
    label,
    place,
)
from .torch_file import TorchFile

CHUNK = 1 << 22


class Source(Protocol):
    """An opened file; its header is checked, its tensors are when they are read.

    Attributes:
        kind: ``"came8bit"``, or of files of ``torch.save`` ``"state_dict"`` for a state dict of
            came8bit and ``"came-pytorch"`` for one of that.
        groups: saved options of every group.
        entries: the parameters in the saved order.
        strangers: keys of states that belong to no parameter.
        user: strings that the caller kept beside the state.
        nbytes: size of the file.
        versions: of the file's format and of the program that wrote it, where known.
    """

    kind: str
    groups: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    strangers: Sequence[str]
    user: Mapping[str, str]
    nbytes: int
    versions: Mapping[str, Any]

    def read(self, position: int) -> dict[str, Tensor]:
        """Return the state of a parameter as new CPU tensors; empty without state.

        Raises:
            CheckpointError: its checksum is wrong.
        """


class SavedFile:
    """A checkpoint of came8bit; see :class:`Source`.

    The file stays open, so one that is put in its place meanwhile does not mix with it. It is
    read, not mapped: a mapping would need address space for all of it, and a file that shrinks
    would kill the process.

    Raises:
        CheckpointError: it is foreign, newer, truncated, or the header is damaged.
    """

    kind = "came8bit"
    strangers: Sequence[str] = ()

    def __init__(self, file: BinaryIO, nbytes: int) -> None:
        self._file, self.nbytes = file, nbytes
        file.seek(0)
        first = file.read(9)
        size = header_size(first, self.nbytes)
        file.seek(8)
        header = parse_header(first[:8], file.read(size), self.nbytes)
        self._data = 8 + size
        self.groups: Sequence[Mapping[str, Any]] = header.groups
        self.entries: Sequence[Entry] = header.entries
        self.user: Mapping[str, str] = header.user
        self.versions: Mapping[str, Any] = {
            "format": header.file_version,
            "came8bit": header.came8bit_version,
        }

    def read(self, position: int) -> dict[str, Tensor]:
        """Return the state of one parameter, its checksum compared again."""
        entry = self.entries[position]
        if entry.step is None:
            return {}
        digest = hashlib.sha256()
        state: dict[str, Tensor] = {}
        self._seek(entry)
        for name, span in sorted(entry.tensors.items(), key=lambda item: item[1][2:]):
            state[name] = torch.empty(span.shape, dtype=span.dtype)
            raw = state[name].reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(raw), CHUNK):
                self._fill(raw[begin : begin + CHUNK])
                digest.update(raw[begin : begin + CHUNK])
        self._compare(digest.hexdigest(), position)
        state["step"], state["skipped"] = torch.tensor(entry.step), torch.tensor(entry.skipped)
        return state

    def _seek(self, entry: Entry) -> None:
        self._file.seek(self._data + min(span.begin for span in entry.tensors.values()))

    def _fill(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            count = self._file.readinto(piece[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError("the file has become shorter while being read")
            done += count

    def _compare(self, digest: str, position: int) -> None:
        entry = self.entries[position]
        if digest != entry.sha256:
            raise CheckpointError(
                f"the state of parameter {label(entry, position)} is damaged (its checksum is "
                "wrong); use an earlier checkpoint"
            )


_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARAM_DTYPES = sorted(map(dtype_name, PARAM_DTYPES))
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_OLD_MAGIC = b"\x80\x02\x8a\n"  # as a length, more than a safetensors header may have
_NOT_OURS = "not an optimizer checkpoint of came8bit"


def header_size(first: bytes, file_size: int) -> int:
    """Return the header's length, from the ``first`` nine bytes of a file of ``file_size``."""
    size = int.from_bytes(first[:8], "little")
    if len(first) < 9 or first[8:9] != b"{" or not 2 <= size <= LARGEST_HEADER:
        raise CheckpointError(
            f"got {file_size} bytes that do not begin like a safetensors file: {_NOT_OURS}, or a "
            "damaged one"
        )
    if 8 + size > file_size:
        raise CheckpointError(
            f"got {file_size} bytes, expected a header of {size} and more: the file is truncated, "
            "or its first bytes are damaged; use an earlier checkpoint"
        )
    return size


def parse_header(first: bytes, text: bytes, file_size: int) -> Header:
    """Check everything that can be known without reading the tensors.

    Args:
        first: the eight bytes of the length field.
        text: the header itself.
        file_size: of the whole file.

    Raises:
        CheckpointError: the file is foreign, newer, truncated, or its header is damaged.
    """
    table = _parse_json(text)
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(metadata, dict):
        raise CheckpointError(f"got a safetensors file without metadata: {_NOT_OURS}")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"got a safetensors file of format {metadata.get('format')!r} with "
            f"{len(table)} tensors such as {sorted(table)[:3]}: {_NOT_OURS}; a model's file is "
            "loaded into the model"
        )
    version = metadata.get("format_version")
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise _damaged(f"format_version is {version!r}")
    if int(version) > FILE_VERSION:
        raise CheckpointError(
            f"got a checkpoint of format version {version}, written by came8bit "
            f"{metadata.get('came8bit_version')}; this came8bit reads up to {FILE_VERSION}: "
            "upgrade came8bit"
        )
    _check_digest(first, text, metadata)
    # From here on the header is as it was written; it may still make no sense.
    with explained("the header is damaged"):
        header = _read_header(table, metadata)
    _check_states(header)
    expected = 8 + len(text) + header.data_bytes
    if file_size != expected:
        what = "truncated" if file_size < expected else "damaged"
        raise CheckpointError(
            f"got {file_size} bytes, expected {expected}: the file is {what}; "
            "use an earlier checkpoint"
        )
    return header


def _parse_json(text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key is there twice")
        return table

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header is not JSON ({str(error)[:200]}): {_NOT_OURS}, or a damaged one"
        ) from error


def _check_digest(first: bytes, text: bytes, metadata: Mapping[str, Any]) -> None:
    digest = metadata.get("header_sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise _damaged("header_sha256 is not there")
    mark = b'"header_sha256":"%b"'
    written = mark % digest.encode()
    if text.count(written) != 1:
        raise _damaged("header_sha256 is not where it was")
    blank = text.replace(written, mark % NO_DIGEST.encode())
    if hashlib.sha256(first[:8] + blank).hexdigest() != digest:
        raise _damaged("its checksum is wrong")


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"the header is damaged: {what}; use an earlier checkpoint")


def _read_header(table: dict[str, Any], metadata: Mapping[str, Any]) -> Header:
    groups = [
        {str(key): decode(value) for key, value in group.items()}
        for group in _parse_json(metadata["groups"].encode())
    ]
    rows = _parse_json(metadata["parameters"].encode())
    entries: list[Entry] = []
    begin = 0
    for position, row in enumerate(rows):
        entry = _read_entry(row, len(groups))
        prefix = label(entry, position) + "."
        tensors = _take_tensors(table, prefix) if entry.step is not None else {}
        entry = replace(entry, tensors=tensors)
        entries.append(entry)
        for name, span in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if span.begin != begin:
                raise ValueError(f"{prefix}{name} begins at {span.begin}, expected {begin}")
            begin = span.end
    if table:
        raise ValueError(f"tensors that belong to no parameter: {sorted(table)[:3]}")
    named = [entry.name for entry in entries if entry.name is not None]
    if named and (len(named) != len(entries) or len(set(named)) != len(named)):
        raise ValueError("parameter names are missing or not unique")
    user = _parse_json(metadata["user"].encode())
    if not all(isinstance(value, str) for value in user.values()):
        raise ValueError("the user's metadata are not strings")
    return Header(
        groups, entries, user, int(metadata["format_version"]), metadata["came8bit_version"]
    )


def _read_entry(row: dict[str, Any], groups: int) -> Entry:
    name, shape, dtype = row["name"], row["shape"], row["dtype"]
    step, skipped, digest = row["step"], row.get("skipped", 0), row.get("sha256")
    # What never trains, and so has no state, may be of any dtype.
    known = dtype in (None, *_PARAM_DTYPES) or (step is None and _is_dtype(dtype))
    if not (known and (name is None or isinstance(name, str))):
        raise ValueError(f"got name {name!r} and dtype {dtype!r}")
    if step is not None:
        _count(step)
        _count(skipped)
        if shape is None or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"state without shape or checksum: {row}")
    shape = None if shape is None else _counts(shape)
    if not _count(row["group"]) < groups:
        raise ValueError(f"group {row['group']} does not exist")
    return Entry(name, row["group"], shape, dtype, step, skipped, digest)


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def _take_tensors(table: dict[str, Any], prefix: str) -> dict[str, Span]:
    """Remove the tensors of one parameter from ``table``."""
    spans = {}
    for name in (
        *("exp_avg", "absmax", "scales", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
        *("exp_avg_res_row", "exp_avg_res_col", "rms_ratio"),
    ):
        row = table.pop(prefix + name, None)
        if row is not None:
            begin, end = _counts(row["data_offsets"])
            spans[name] = Span(_DTYPES[row["dtype"]], _counts(row["shape"]), begin, end)
    return spans


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"got {value!r}, expected a count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"got {values!r}, expected a list of counts")
    return tuple(_count(value) for value in values)


def _check_states(header: Header) -> None:
    """Check that every state is one that this version keeps, where it would have put it."""
    try:
        check_versions(header.groups, any(entry.tensors for entry in header.entries))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for position, entry in enumerate(header.entries):
        if entry.step is None:
            continue
        layout = entry.layout
        first = min((span.begin for span in entry.tensors.values()), default=0)
        if layout is None or dict(entry.tensors) != place(layout, first):
            got = {name: tuple(span.shape) for name, span in entry.tensors.items()}
            known = [
                {name: span.shape for name, span in place(one, 0).items()}
                for one in possible_layouts(entry.shape or ())
            ]
            raise CheckpointError(
                f"parameter {label(entry, position)} of shape {entry.shape} has state {got}, "
                f"expected one of {known}; the file was not written by came8bit"
            )


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a checkpoint, or a state dict that ``torch.save`` wrote; closed when the block ends.

    Errors of the file that leave the block name it.

    Raises:
        CheckpointError: it is neither, or damaged; the message begins with ``path``.
        OSError: there is no file, or it cannot be read.
    """
    name = printable(os.fsdecode(path))
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(
                    "got a pipe or a device, expected a file, which can be read twice; write the "
                    "contents into one"
                )
            if sys.byteorder != "little":
                raise CheckpointError("checkpoints are little-endian; this processor is not")
            first = file.read(len(MAGIC))
            if first == _OLD_MAGIC:
                raise CheckpointError(
                    "a file of torch.save in its format of before version 1.6; save it again: "
                    f"torch.save(torch.load({name!r}), ...)"
                )
            size = status.st_size
            yield TorchFile(file, size) if first == MAGIC else SavedFile(file, size)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(
            text if text.startswith(f"{name}: ") else f"{name}: {text}"
        ) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, name) from error
        raise


def _open_without_waiting(path: str, flags: int) -> int:
    """Refuse pipes and devices: opening a pipe would wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
