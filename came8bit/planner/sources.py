"""Where models come from: a name, a config.json, safetensors headers, or a folder of them.

Headers need no package. A file begins with the length of its header (8 bytes, little endian) and
the header, a JSON object: tensor name -> dtype, shape, offsets. ``model.safetensors.index.json``
maps tensor names to the files beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OTHER_WAY, UnknownModel
from .activations import Model, Parameter, note_of_left_out
from .workloads import from_config

_LONGEST_CONFIG = 10_000_000  # bytes
_DEEPEST = 50
_MOST_EXPERTS = 65_536  # layers * experts: each is a module, made one by one
#: Largest numbers of a config.json by the words in their keys; the last holds for all others. What
#: is built so many times is bounded lower than what is so wide: tracing takes 0.3 s a layer.
_BOUNDS = (
    (re.compile(r"layers?$|blocks$|depths?$|stages$"), 200),
    (re.compile(r"head|expert|group|label|num_beam"), 100_000),
    (re.compile(r"size|dim|width|embd|inner|ff|hidden|position|length|ctx|window|n_"), 2**24),
    (re.compile(""), 2**53),
)

_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_GPT2_KEYS = ("n_embd", "n_layer", "n_head")
_LLAMAS = {
    "tinyllama-1.1b": ("TinyLlama 1.1B", "llama", 2048, 5632, 22, 32, 4, 32_000, False),
    "llama-1b": ("Llama 3.2 1B", "llama", 2048, 8192, 16, 32, 8, 128_256, True),
    "llama-3b": ("Llama 3.2 3B", "llama", 3072, 8192, 28, 24, 8, 128_256, True),
    "llama-7b": ("Llama 2 7B", "llama", 4096, 11_008, 32, 32, 32, 32_000, False),
    "llama-8b": ("Llama 3 and 3.1 8B", "llama", 4096, 14_336, 32, 32, 8, 128_256, False),
    "llama-13b": ("Llama 2 13B", "llama", 5120, 13_824, 40, 40, 40, 32_000, False),
    "mistral-7b": ("Mistral 7B v0.1", "mistral", 4096, 14_336, 32, 32, 8, 32_000, False),
    "qwen2.5-0.5b": ("Qwen2.5 0.5B", "qwen2", 896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": ("Qwen2.5 1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-7b": ("Qwen2.5 7B", "qwen2", 3584, 18_944, 28, 28, 4, 152_064, False),
    "gemma-2b": ("Gemma 2B", "gemma", 2048, 16_384, 18, 8, 1, 256_000, True),
}
_GPT2S = {
    "gpt2": ("GPT-2 small", 768, 12, 12),
    "gpt2-medium": ("GPT-2 medium", 1024, 24, 16),
    "gpt2-large": ("GPT-2 large", 1280, 36, 20),
    "gpt2-xl": ("GPT-2 XL", 1600, 48, 25),
}
_SANA = {
    "_class_name": "SanaTransformer2DModel",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "in_channels": 32,
    "mlp_ratio": 2.5,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
}


def _configs() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (title, *sizes) in _GPT2S.items():
        config: dict[str, Any] = dict(zip(_GPT2_KEYS, sizes, strict=True))
        config |= {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024}
        found[name] = (title, config)
    for name, (title, kind, *rest) in _LLAMAS.items():
        found[name] = (title, {"model_type": kind, **dict(zip(_LLAMA_KEYS, rest, strict=True))})
    found["gemma-2b"][1]["head_dim"] = 256
    found["sana-1.6b"] = ("SANA 1.6B, the transformer", dict(_SANA))
    return found


#: name -> (what it is, the keys of its config.json that decide shapes)
CONFIGS = _configs()


def named(name: str) -> Model:
    """Return the model called ``name``.

    Raises:
        UnknownModel: there is none; the message lists the names.
    """
    if name not in CONFIGS:
        raise UnknownModel(f"there is no model called {name!r}; names are {', '.join(CONFIGS)}")
    title, config = CONFIGS[name]
    return from_config(config, name, f"{title}, sizes as published")


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object, or a number in it is out of bounds.
    """
    with path.open("rb") as file:
        text = file.read(_LONGEST_CONFIG + 1)
    if len(text) > _LONGEST_CONFIG:
        raise ValueError(f"{path}: expected at most {_LONGEST_CONFIG:,} bytes")
    config = parse_json(text, str(path))
    check_numbers(config, str(path))
    return config


def check_numbers(config: Any, where: str) -> None:
    """Raise ``ValueError`` if a number in ``config`` is larger than any model needs.

    Texts of digits are numbers, too: libraries turn some of them into numbers.

    Args:
        config: what JSON describes.
        where: begins the message.
    """
    layers = experts = 1
    left: list[tuple[Any, str, int]] = [(config, "", 0)]
    while left:
        value, key, depth = left.pop()
        if depth > _DEEPEST:
            raise ValueError(f"{where}: nested too deep, expected at most {_DEEPEST} levels")
        if isinstance(value, dict):
            left += [(inner, str(name), depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            left += [(inner, key, depth + 1) for inner in value]
        elif isinstance(value, str) and value.strip().isdecimal():
            left.append((int(value) if len(value) < 100 else math.inf, key, depth))
        elif isinstance(value, (int, float)):
            words, largest = next(bound for bound in _BOUNDS if bound[0].search(key.lower()))
            if not abs(value) <= largest:
                raise ValueError(
                    f"{where}: got {key} {str(value)[:30]}, expected at most {largest:,}"
                )
            if words is _BOUNDS[0][0]:
                layers = max(layers, int(value))
            elif "expert" in key.lower():
                experts = max(experts, int(value))
    if layers * experts > _MOST_EXPERTS:
        raise ValueError(
            f"{where}: got {layers:,} layers and {experts:,} experts, expected at most "
            f"{_MOST_EXPERTS:,} experts in all layers together"
        )


def from_path(path: Path) -> Model:
    """Return the model at ``path``: a config.json, a safetensors file, an index, or a folder.

    In a folder, config.json is taken if the libraries that are installed know its kind, for it
    tells about activations, too; else the weights.

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
        config = read_config(path)
        try:
            return from_config(config, str(config.get("_name_or_path") or ""), str(path))
        except UnknownModel as error:
            raise UnknownModel(f"{path}: {error} {OTHER_WAY}", error.what) from error
    raise ValueError(
        f"got {path}, expected a config.json, a .safetensors file, a .safetensors.index.json or a "
        "folder that holds one of them"
    )


def _from_folder(folder: Path) -> Model:
    config = folder / "config.json"
    unknown: UnknownModel | None = None
    if config.exists():
        try:
            return from_path(config)
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
        return model if unknown is None else replace(model, unknown=str(unknown.__cause__))
    if unknown is not None:
        raise unknown
    raise ValueError(f"{folder} holds neither a config.json nor a safetensors file")


# --- headers of safetensors files -----------------------------------------------------------------

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
