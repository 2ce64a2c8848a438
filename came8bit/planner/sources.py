"""Where models come from: a name, a config.json, safetensors headers, or a folder of them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OTHER_WAY, UnknownModel
from .model import INDEX, Model, from_safetensors, parse_json
from .workloads import from_config

_LONGEST_CONFIG = 10_000_000  # bytes
#: Largest numbers of a config.json by the words in their keys; the last holds for all others. What
#: is built so many times is bounded lower than what is so wide.
_BOUNDS = (
    (re.compile(r"layers?$|blocks$|depths?$|stages$"), 1_000),
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


def check_numbers(value: Any, where: str, key: str = "") -> None:
    """Raise ``ValueError`` if a number in ``value`` is larger than any model needs.

    Args:
        value: what JSON describes.
        where: begins the message.
        key: of ``value``, in the message, too.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(inner, where, str(name))
    elif isinstance(value, list):
        for inner in value:
            check_numbers(inner, where, key)
    elif isinstance(value, (int, float)):
        largest = next(bound for words, bound in _BOUNDS if words.search(key.lower()))
        if not math.isfinite(value) or abs(value) > largest:
            raise ValueError(f"{where}: got {key} {value}, expected at most {largest:,}")


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
