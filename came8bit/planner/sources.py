"""Shapes from safetensors files: their headers only, read without any package.

A file begins with the length of its header (8 bytes, little endian) and the header, a JSON object:
tensor name -> dtype, shape, offsets.  ``model.safetensors.index.json`` maps tensor names to the
files beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UnknownModel
from .configs import from_config
from .model import Model, Parameter

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes
_CHECKPOINT = "came8bit optimizer state"  # the format that came8bit.save_checkpoint writes
_FLOATS = ("F64", "F32", "F16", "BF16")
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


def read_header(path: Path) -> dict[str, Any]:
    """Header of the safetensors file at ``path``: tensor name -> description.

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
    if len(text) < length:
        raise ValueError(
            f"{path} is cut off: {len(text)} of {length} bytes of its header are there"
        )
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not an object")
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.get("format") == _CHECKPOINT:
        raise ValueError(
            f"{path} is a checkpoint of a came8bit optimizer, not the weights of a model; give "
            f"the model's file. came8bit inspect {path} shows what is in it"
        )
    return header


def _tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor in the file."""
    for name, entry in read_header(path).items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
            if min(shape, default=0) < 0:
                raise ValueError("a size is negative")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the header describes {name!r} as {entry!r}") from error
        yield name, dtype, shape


def _files_of_index(path: Path) -> list[Path]:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index: it has no object 'weight_map'") from error
    files = [path.parent / str(name) for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path} names files that are not beside it: {', '.join(missing)}. The index has no "
            "shapes; they are in the headers of these files (or give the config.json)"
        )
    return files


def from_safetensors(path: Path) -> Model:
    """The model whose weights are in ``path``, a .safetensors file or an index of several.

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
    notes = []
    if left_out:
        shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        notes.append(f"{len(left_out)} tensors that do not train are left out: {shown}.")
    what = f"{len(files)} files" if len(files) > 1 else "1 file"
    return Model(path.name, f"{path} (headers of {what})", tuple(parameters), notes=tuple(notes))


def from_path(path: Path) -> Model:
    """The model at ``path``: a config.json, a safetensors file, an index, or a folder of them.

    In a folder, config.json is taken if its kind is known, for it tells about activations, too;
    else the weights.

    Raises:
        OSError: a file cannot be read.
        UnknownModel: a config.json of an unknown kind, and no weights beside it.
        ValueError: a file is not what it should be.
    """
    if path.is_dir():
        return _from_folder(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"got {path}, which is a pipe or a device, expected a file or a folder")
    if path.name.endswith(".index.json") or path.suffix == ".safetensors":
        return from_safetensors(path)
    if path.suffix == ".json":
        return from_config(path)
    raise ValueError(
        f"got {path}, expected a config.json, a .safetensors file, a .safetensors.index.json or a "
        "folder that holds one of them"
    )


def _from_folder(folder: Path) -> Model:
    config = folder / "config.json"
    unknown: UnknownModel | None = None
    if config.is_file():
        try:
            return from_config(config)
        except UnknownModel as error:
            unknown = error
    indices = [folder / INDEX, *sorted(folder.glob("*.safetensors.index.json"))]
    weights = [path for path in indices if path.is_file()] or sorted(folder.glob("*.safetensors"))
    if len(weights) > 1 and weights[0].suffix == ".safetensors":
        raise ValueError(
            f"{folder} holds {len(weights)} safetensors files and no index; name one of them"
        )
    if weights:
        model = from_safetensors(weights[0])
        return model if unknown is None else replace(model, unknown=unknown.what)
    if unknown is not None:
        raise unknown
    raise ValueError(f"{folder} holds neither a config.json nor a safetensors file")
