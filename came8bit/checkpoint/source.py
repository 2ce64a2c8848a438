"""A file that state can be loaded from, and the kind that :mod:`.writer` writes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from .error import CheckpointError
from .header import Entry, label
from .parse import header_size, parse_header

CHUNK = 1 << 22


class Source(Protocol):
    """An opened file; its header is checked, its tensors are not before :meth:`verify`.

    Attributes:
        kind: ``"came8bit"`` or ``"came-pytorch"``.
        groups: saved options of every group.
        entries: the parameters in the saved order.
        user: strings that the caller kept beside the state.
        nbytes: size of the file.
        versions: of the file's format and of the program that wrote it, where known.
    """

    kind: str
    groups: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    user: Mapping[str, str]
    nbytes: int
    versions: Mapping[str, Any]

    def verify(self) -> None:
        """Read everything once; raises :class:`CheckpointError` if a bit is wrong."""

    def read(self, position: int) -> dict[str, Tensor]:
        """The state of a parameter as new CPU tensors in a layout of came8bit; may be empty."""

    def close(self) -> None:
        """Close the file."""


class SavedFile:
    """A checkpoint of came8bit; see :class:`Source`.

    The file stays open, so one that is put in its place meanwhile does not mix with it.  It is
    read, not mapped: a mapping would need address space for all of it, and a file that shrinks
    would kill the process.

    Raises:
        CheckpointError: it is foreign, newer, truncated, or the header is damaged.
    """

    kind = "came8bit"

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO) -> None:
        if sys.byteorder != "little":
            raise CheckpointError("checkpoints are little-endian; this processor is not")
        self._path, self._file = path, file
        self.nbytes = os.fstat(file.fileno()).st_size
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

    def verify(self) -> None:
        """Compare the checksum of every parameter, in a buffer of constant size."""
        buffer = memoryview(bytearray(CHUNK))
        for position, entry in enumerate(self.entries):
            if entry.tensors:
                digest = hashlib.sha256()
                self._seek(entry)
                left = entry.nbytes
                while left:
                    piece = buffer[: min(left, CHUNK)]
                    self._fill(piece)
                    digest.update(piece)
                    left -= len(piece)
                self._compare(digest.hexdigest(), position)

    def read(self, position: int) -> dict[str, Tensor]:
        """The state of one parameter, its checksum compared again."""
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

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _seek(self, entry: Entry) -> None:
        self._file.seek(self._data + min(span.begin for span in entry.tensors.values()))

    def _fill(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            count = self._file.readinto(piece[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self._path}: the file has become shorter while being read")
            done += count

    def _compare(self, digest: str, position: int) -> None:
        entry = self.entries[position]
        if digest != entry.sha256:
            raise CheckpointError(
                f"{self._path}: the state of parameter {label(entry, position)} is damaged (its "
                "checksum is wrong); use an earlier checkpoint"
            )
