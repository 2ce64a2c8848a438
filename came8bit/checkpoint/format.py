"""What stands at the head of a checkpoint, as data; :mod:`.reader` reads it, here it is written.

A checkpoint is a safetensors file, which ``docs/checkpoints.md`` describes. What this package adds
lies in the header's ``__metadata__``, where other programs leave it alone.

The tensors of a parameter lie next to each other, in the order of :class:`~..state.layout.Layout`,
codes last, so that everything before them is aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..errors import CheckpointError
from ..state.layout import COUNTERS, Buffer, Layout, possible_layouts

FORMAT = "came8bit optimizer state"
FILE_VERSION = 1
"""Version of the file; that of the state is in every group's ``format_version``."""

LARGEST_HEADER = 100_000_000
"""What the safetensors library reads at most."""

DTYPE_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
NO_DIGEST = "0" * 64
_LARGEST_COUNT = 2**63 - 1


class Span(NamedTuple):
    """A tensor in the file; ``begin`` and ``end`` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Entry:
    """A parameter as a checkpoint knows it.

    Attributes:
        name: unique among the parameters; ``None`` for all if they have no names.
        group: number of its parameter group.
        shape: ``None`` where an imported file did not tell.
        dtype: of the parameter, such as ``"bfloat16"``; ``None`` as above.
        step: ``None`` if the parameter has no state yet.
        skipped: steps left out because of a gradient that was not finite.
        sha256: of the tensors' bytes, in hexadecimal.
        tensors: buffer name to place in the file; empty without state.
    """

    name: str | None
    group: int
    shape: tuple[int, ...] | None
    dtype: str | None
    step: int | None = None
    skipped: int = 0
    sha256: str | None = None
    tensors: Mapping[str, Span] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(span.end - span.begin for span in self.tensors.values())

    @property
    def layout(self) -> Layout | None:
        """The layout of the state, ``None`` if there is none."""
        if self.step is None or self.shape is None:
            return None
        return find_layout(
            self.shape, {name: (span.dtype, span.shape) for name, span in self.tensors.items()}
        )


@dataclass(frozen=True)
class Header:
    """All that a checkpoint says before its tensors."""

    groups: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    user: Mapping[str, str] = field(default_factory=dict)
    file_version: int = FILE_VERSION
    came8bit_version: str = __version__

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries)


def stored_buffers(layout: Layout) -> list[Buffer]:
    """Return the buffers that become tensors of the file, in the file's order."""
    buffers = [buffer for buffer in layout.buffers if buffer.name not in COUNTERS]
    return sorted(buffers, key=lambda buffer: -buffer.dtype.itemsize)


def stored_bytes(layout: Layout) -> int:
    """Return the bytes of a parameter's tensors in the file."""
    return sum(buffer.nbytes for buffer in stored_buffers(layout))


def find_layout(
    shape: Sequence[int], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Layout | None:
    """Return the layout of a parameter of ``shape`` that stores exactly ``tensors``, if any."""
    for layout in possible_layouts(shape):
        if tensors == {b.name: (b.dtype, b.shape) for b in stored_buffers(layout)}:
            return layout
    return None


def place(layout: Layout, begin: int) -> dict[str, Span]:
    """Return where the tensors of a parameter lie whose first byte is at ``begin``."""
    spans = {}
    for buffer in stored_buffers(layout):
        spans[buffer.name] = Span(buffer.dtype, buffer.shape, begin, begin + buffer.nbytes)
        begin += buffer.nbytes
    return spans


def label(entry: Entry, position: int) -> str:
    """Return what the parameter is called in tensor names and messages."""
    return str(position) if entry.name is None else entry.name


def reserved_bytes(header: Header) -> int:
    """Return an upper bound for the length of ``header`` when all its parameters will have state.

    So the tensors can be written before the header, and each state has to be read only once.
    """
    worst = [_longest(entry) for entry in header.entries]
    longest = Header(header.groups, worst, header.user, header.file_version)
    size = len(_render(longest, NO_DIGEST))
    size += -size % 8
    if size > LARGEST_HEADER:
        raise CheckpointError(
            f"{len(worst)} parameters, their names and options need a header of {size} bytes; "
            f"safetensors allows {LARGEST_HEADER}; save the groups in several optimizers"
        )
    return size


def header_bytes(header: Header, size: int, digest: str) -> bytes:
    """Return the length field and the header, padded to ``size`` bytes."""
    text = _render(header, digest)
    if len(text) > size:
        raise AssertionError(f"a header of {len(text)} bytes does not fit into {size}")
    return size.to_bytes(8, "little") + text + b" " * (size - len(text))


def _longest(entry: Entry) -> Entry:
    """Return ``entry`` with the state that takes the most room in a header."""
    if entry.shape is None:
        return entry
    layouts = possible_layouts(entry.shape)
    # Offsets are longest at the end of the largest file there can be.
    places = [
        {name: span._replace(begin=10**18, end=10**18) for name, span in place(layout, 0).items()}
        for layout in layouts
    ]
    full = replace(entry, step=_LARGEST_COUNT, skipped=_LARGEST_COUNT, sha256=NO_DIGEST)
    entries = [replace(full, tensors=spans) for spans in places]
    return max(entries, key=lambda one: len(_dump(_tensor_table(one, 10**9))))


def _tensor_table(entry: Entry, position: int) -> dict[str, Any]:
    return {
        f"{label(entry, position)}.{name}": {
            "dtype": DTYPE_NAMES[span.dtype],
            "shape": span.shape,
            "data_offsets": [span.begin, span.end],
        }
        for name, span in entry.tensors.items()
    }


def _parameter_table(entry: Entry) -> dict[str, Any]:
    table: dict[str, Any] = {
        "name": entry.name,
        "group": entry.group,
        "shape": entry.shape,
        "dtype": entry.dtype,
        "step": entry.step,
    }
    if entry.step is not None:
        table |= {"skipped": entry.skipped, "sha256": entry.sha256}
    return table


def _render(header: Header, digest: str) -> bytes:
    metadata = {
        "format": FORMAT,
        "format_version": str(header.file_version),
        "came8bit_version": header.came8bit_version,
        "header_sha256": digest,
        "groups": _dump(header.groups),
        "parameters": _dump([_parameter_table(entry) for entry in header.entries]),
        "user": _dump(header.user),
    }
    table: dict[str, Any] = {"__metadata__": metadata}
    for position, entry in enumerate(header.entries):
        table |= _tensor_table(entry, position)
    return _dump(table).encode("ascii")


def _dump(value: Any) -> str:
    # Strict JSON: an infinity has been encoded by :func:`encode`.
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


_LARGEST_BITS = 1024
_DEEPEST = 50
_LARGEST_TENSOR = 4096  # bytes; options are numbers, not buffers
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}


def encode(value: Any, what: str) -> Any:
    """Return ``value`` in terms of JSON; :func:`decode` gives it back with its types and bits.

    NumPy's numbers become Python's.

    Args:
        value: ``None``, bool, number, str, tuple, list, dict with str keys, or a small tensor.
        what: names the value in the error message.

    Raises:
        CheckpointError: anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        if int(value).bit_length() > _LARGEST_BITS:
            raise CheckpointError(f"{what} has {int(value).bit_length()} bits, which is too many")
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, list):
        return [encode(item, what) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, what) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, what) for key, item in value.items()}}
    if isinstance(value, Tensor):
        return {"tensor": _encode_tensor(value, what)}
    raise CheckpointError(
        f"{what} is a {type(value).__name__}, expected None, a bool, number, string, small tensor, "
        "or tuples, lists and dicts of these; remove it from the parameter group or convert it"
    )


def decode(value: Any, depth: int = 0) -> Any:
    """Undo :func:`encode`; tensors are on the CPU.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: ``value`` did not come from there.
    """
    if depth > _DEEPEST:
        raise ValueError("an option is nested too deeply")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float({"inf": "inf", "-inf": "-inf", "nan": "nan"}[content])
    if kind == "tuple":
        return tuple(decode(item, depth + 1) for item in content)
    if kind == "dict":
        return {key: decode(item, depth + 1) for key, item in content.items()}
    if kind == "tensor":
        data = torch.tensor(list(bytes.fromhex(content["bytes"])), dtype=torch.uint8)
        return data.view(_DTYPES[content["dtype"]]).reshape(content["shape"])
    raise ValueError(f"unknown kind of value {kind!r}")


def _encode_tensor(value: Tensor, what: str) -> dict[str, Any]:
    name = dtype_name(value.dtype)
    if name not in _DTYPES or value.layout != torch.strided or value.nbytes > _LARGEST_TENSOR:
        raise CheckpointError(
            f"{what} is a tensor of {value.dtype}, layout {value.layout} and {value.nbytes} bytes, "
            f"expected a dense real one of at most {_LARGEST_TENSOR} bytes; remove it from the "
            "parameter group"
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    return {
        "dtype": name,
        "shape": list(value.shape),
        "bytes": bytes(flat.view(torch.uint8).tolist()).hex(),
    }
