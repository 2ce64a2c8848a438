"""What the planner knows of a model: its parameters, and how to run it on fake tensors.

Shapes may come from the headers of safetensors files, which need no package. A file begins with the
length of its header (8 bytes, little endian) and the header, a JSON object: tensor name -> dtype,
shape, offsets. ``model.safetensors.index.json`` maps tensor names to the files beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .activations import Workload


@dataclass(frozen=True)
class Parameter:
    """A trained tensor.

    Attributes:
        name: as in ``model.named_parameters()``.
        shape: sizes.
        embedding: whether it is the table of an ``nn.Embedding``.
    """

    name: str
    shape: tuple[int, ...]
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        name: human-readable.
        source: where the shapes come from, human-readable.
        parameters: every parameter once.
        workload: what runs it; ``None`` where only shapes are known.
        notes: what the reader has to know, one sentence each.
        unknown: why activations are not known, where that needs saying.
    """

    name: str
    source: str
    parameters: tuple[Parameter, ...]
    workload: Workload | None = None
    notes: tuple[str, ...] = field(default=())
    unknown: str = ""

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def largest(self) -> Parameter:
        """The largest parameter."""
        return max(self.parameters, key=lambda parameter: parameter.numel)


INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes
_LARGEST = 2**48  # elements, bytes of a file
_CHECKPOINT = "came8bit optimizer state"  # the format that came8bit.save_checkpoint writes
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: Names of tensors that are saved but not trained.
_BUFFERS = re.compile(
    r"(^|\.)(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|inv_freq"
    r"|position_ids|token_type_ids|running_mean|running_var|num_batches_tracked)$"
)
#: Names of the tables of ``nn.Embedding``, for options that treat them apart.
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe|word_embeddings|position_embeddings"
    r"|token_type_embeddings|tok_embeddings)\.weight$"
)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, UTF-8 without a key twice.

    Raises:
        ValueError: it is something else; the message begins with ``what``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} is there twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{what} is not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}: expected a JSON object, got a {type(found).__name__}")
    return found


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of the safetensors file at ``path``: tensor name -> description.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file, or is cut off, or holds an optimizer's state.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file: it does not begin with a header")
        text = file.read(length)
        size = os.fstat(file.fileno()).st_size
    if len(text) < length:
        raise ValueError(f"{path} is cut off: got {len(text)} of {length} bytes of its header")
    header = parse_json(text, f"{path} is not a safetensors file: its header")
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.get("format") == _CHECKPOINT:
        raise ValueError(
            f"{path} is a checkpoint of a came8bit optimizer, not the weights of a model; give "
            f"the model's file. came8bit inspect {path} shows what is in it"
        )
    _check_places(path, header, size - 8 - length)
    return header


def _check_places(path: Path, header: dict[str, Any], available: int) -> None:
    """Raise ``ValueError`` unless the tensors lie one behind another in ``available`` bytes."""
    places = []
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            whole = all(
                type(n) is int and 0 <= n <= _LARGEST for n in (begin, end, *entry["shape"])
            )
            numel = math.prod(entry["shape"]) if whole else -1
            fits = isinstance(entry["dtype"], str) and begin <= end and 0 <= numel <= _LARGEST
            if entry["dtype"] in _FLOATS:
                fits = fits and end - begin == numel * _FLOATS[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{path} is damaged: its header describes {name!r} as {entry!r}")
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ValueError(f"{path} is damaged: {name!r} begins at {begin}, expected {at}")
        at = end
    if at != available:
        raise ValueError(f"{path} is damaged: got {available} bytes of tensors, expected {at}")


def _tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of every tensor in the file."""
    for name, entry in read_header(path).items():
        yield name, entry["dtype"], tuple(entry["shape"])


def _files_of_index(path: Path) -> list[Path]:
    weights = parse_json(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is not an index: it has no object 'weight_map'")
    names = sorted({str(name) for name in weights.values()})
    files = [path.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path} names files that are not beside it: {', '.join(missing)}. The index has no "
            "shapes; they are in the headers of these files (or give the config.json)"
        )
    return files


def from_safetensors(path: Path) -> Model:
    """Return the model whose weights are in ``path``, a .safetensors file or an index of several.

    Tensors that are known not to train (masks, positions, running statistics) and tensors of
    integers are left out, and a note says so.

    Raises:
        OSError: a file cannot be read.
        ValueError: one is not what it should be, or the weights are quantized.
    """
    files = _files_of_index(path) if path.name.endswith(".json") else [path]
    parameters: list[Parameter] = []
    left_out: list[str] = []
    packed = 0
    for file in files:
        for name, dtype, shape in _tensors(file):
            parameter = Parameter(name, shape, embedding=_EMBEDDINGS.search(name) is not None)
            if _BUFFERS.search(name) or dtype not in _FLOATS:
                left_out.append(name)
                packed += 0 if _BUFFERS.search(name) else parameter.numel
            else:
                parameters.append(parameter)
    numel = sum(parameter.numel for parameter in parameters)
    if packed > numel // 10:
        raise ValueError(
            f"{path} holds {packed:,} values that are neither fp32, bf16 nor fp16, beside "
            f"{numel:,} that are: quantized weights do not train as they are; give the original "
            "model"
        )
    if not parameters:
        raise ValueError(f"{path} holds no tensors to train")
    what = f"{len(files)} files" if len(files) > 1 else "1 file"
    return Model(
        path.name,
        f"{path} (headers of {what})",
        tuple(parameters),
        notes=(note_of_left_out(left_out),) if left_out else (),
    )


def note_of_left_out(names: list[str]) -> str:
    """Return the note that tensors called ``names`` do not train."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensors that do not train are left out: {shown}."
