"""Architectures from a Hugging Face ``config.json``.

Only families whose shapes the tests compare with transformers' own modules are accepted.  A key
that a file leaves out has the value that transformers' configuration class would give it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OTHER_WAY, UnknownModel
from .decoders import Decoder
from .gpt import GPT2, GPTNeoX
from .heads import head_of
from .model import Architecture, Model, from_architecture
from .sana import Sana

Config = Mapping[str, Any]


def _size(config: Config, *keys: str) -> int:
    """A size that has to be there, under the first of ``keys`` that is."""
    value = _size_or_none(config, *keys)
    if value is None:
        raise ValueError(f"the configuration lacks {keys[-1]!r}, which its kind of model needs")
    return value


def _size_or_none(config: Config, *keys: str) -> int | None:
    """A size, which is a whole number of at least 1; ``None`` if none of ``keys`` is there."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e3 is a float in JSON
        if type(value) is not int or value < 1:
            raise ValueError(
                f"the configuration says {key} = {config[key]!r}, expected a whole number of at "
                "least 1; correct the file"
            )
        return value
    return None


def _decoder(**traits: Any) -> Callable[[Config], Decoder]:
    """Read the sizes common to all decoders; ``traits`` are a family's habits and defaults."""
    defaults = {"tied": False, "attention_bias": False, "mlp_bias": False, **traits}
    head_dim_default = defaults.pop("head_dim", None)
    kv_required = defaults.pop("kv_required", False)
    has_attention_bias = defaults.pop("attention_bias_key", True)
    has_mlp_bias = defaults.pop("mlp_bias_key", False)
    has_head_dim = defaults.pop("head_dim_key", True)

    def read(config: Config) -> Decoder:
        habits = dict(defaults)
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = (_size if kv_required else _size_or_none)(config, "num_key_value_heads")
        head_dim = _size_or_none(config, "head_dim") if has_head_dim else None
        bias = habits.pop("attention_bias")
        if has_attention_bias:
            bias = bool(config.get("attention_bias", bias))
        mlp_bias = habits.pop("mlp_bias")
        if has_mlp_bias:
            mlp_bias = bool(config.get("mlp_bias", mlp_bias))
        habits.setdefault("qkv_bias", bias)
        habits.setdefault("out_bias", bias)
        tied = config.get("tie_word_embeddings")
        habits["tied"] = habits["tied"] if tied is None else bool(tied)
        habits["dropout"] = bool(config.get("resid_pdrop"))
        if habits.get("softcap"):
            habits["softcap"] = bool(config.get("final_logit_softcapping", 30.0))
        head = head_of(config)
        if head is not None:  # both are the language model's
            habits["tied"] = habits["softcap"] = False
        return Decoder(
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            feed_forward=_size(config, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim or head_dim_default or hidden // heads,
            vocabulary=_size(config, "vocab_size"),
            mlp_bias=mlp_bias,
            head=head,
            **habits,
        )

    return read


def _gpt2(config: Config) -> GPT2:
    if config.get("add_cross_attention"):
        what = "a GPT-2 with cross-attention"
        raise UnknownModel(f"{what} is not known. {OTHER_WAY}", what)
    hidden = _size(config, "n_embd", "hidden_size")
    dropouts = [float(config.get(key, 0.1)) for key in ("resid_pdrop", "embd_pdrop")]
    head = head_of(config)
    return GPT2(
        layers=_size(config, "n_layer", "num_hidden_layers"),
        hidden=hidden,
        feed_forward=_size_or_none(config, "n_inner") or 4 * hidden,
        heads=_size(config, "n_head", "num_attention_heads"),
        vocabulary=_size(config, "vocab_size"),
        positions=_size(config, "n_positions", "max_position_embeddings"),
        tied=head is None and bool(config.get("tie_word_embeddings", True)),
        dropout=any(dropouts),
        python_gelu=config.get("activation_function", "gelu_new") == "gelu_new",
        head=head,
    )


def _gpt_neox(config: Config) -> GPTNeoX:
    head = head_of(config)
    return GPTNeoX(
        layers=_size(config, "num_hidden_layers"),
        hidden=_size(config, "hidden_size"),
        feed_forward=_size(config, "intermediate_size"),
        heads=_size(config, "num_attention_heads"),
        vocabulary=_size(config, "vocab_size"),
        tied=head is None and bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", True)),
        parallel=bool(config.get("use_parallel_residual", True)),
        dropout=bool(config.get("hidden_dropout")),
        head=head,
    )


def _sana(config: Config) -> Sana:
    if config.get("interpolation_scale") is not None or config.get("norm_elementwise_affine"):
        what = "a SANA with interpolation_scale or norm_elementwise_affine"
        raise UnknownModel(f"{what} is not known. {OTHER_WAY}", what)
    ratio = config.get("mlp_ratio", config.get("expand_ratio"))
    in_channels = _size_or_none(config, "in_channels") or 32
    return Sana(
        layers=_size(config, "num_layers"),
        heads=_size(config, "num_attention_heads"),
        head_dim=_size(config, "attention_head_dim"),
        cross_heads=_size(config, "num_cross_attention_heads"),
        cross_head_dim=_size(config, "cross_attention_head_dim"),
        caption_channels=_size(config, "caption_channels"),
        expansion=float(2.5 if ratio is None else ratio),
        in_channels=in_channels,
        out_channels=_size_or_none(config, "out_channels") or in_channels,
        patch_size=_size_or_none(config, "patch_size") or 1,
        attention_bias=bool(config.get("attention_bias", False)),
        guidance=bool(config.get("guidance_embeds", False)),
        qk_norm=config.get("qk_norm") is not None,
    )


_GEMMA: dict[str, Any] = {"tied": True, "head_dim": 256, "kv_required": True, "norm_in_fp32": True}

#: ``model_type`` of transformers, or ``_class_name`` of diffusers -> reader.
FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": _decoder(mlp_bias_key=True),
    "mistral": _decoder(kv_required=True, attention_bias_key=False),
    "qwen2": _decoder(
        kv_required=True,
        attention_bias_key=False,
        head_dim_key=False,
        qkv_bias=True,
        out_bias=False,
    ),
    "qwen3": _decoder(kv_required=True, head_dim=128, head_norm="head"),
    "gemma": _decoder(**_GEMMA),
    "gemma2": _decoder(**_GEMMA, norms="both", scores=True, softcap=True),
    "gemma3_text": _decoder(**_GEMMA, norms="both", head_norm="head"),
    "phi3": _decoder(attention_bias_key=False, fused=True),
    "olmo2": _decoder(norms="post", head_norm="full", norm_in_fp32=True, head_dim_key=False),
    "granite": _decoder(mlp_bias_key=True, head_dim_key=False),
    "smollm3": _decoder(tied=True, mlp_bias_key=True, head_dim_key=False),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "SanaTransformer2DModel": _sana,
}


def architecture_of(config: Config) -> Architecture:
    """The architecture that ``config``, the contents of a config.json, describes.

    Raises:
        UnknownModel: the kind of model is not one of :data:`FAMILIES`, or its class is not known.
        ValueError: the model is quantized, or a size is missing or makes no sense.
    """
    if config.get("quantization_config"):
        raise ValueError(
            "the configuration is that of a quantized model, which does not train as it is; give "
            "the one of the original model"
        )
    kind = config.get("model_type") or config.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        what = f"a model of type {kind!r}" if kind else "a model without a model_type"
        said = f"got {what}" if kind else "the configuration names no model_type"
        raise UnknownModel(f"{said}; known are {', '.join(FAMILIES)}. {OTHER_WAY}", what)
    try:
        return FAMILIES[kind](config)
    except TypeError as error:
        raise ValueError(f"the configuration of this {kind} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


def from_config(path: Path) -> Model:
    """The model that a config.json describes; errors as in :func:`architecture_of`."""
    config = read_config(path)
    kind = config.get("model_type") or config.get("_class_name")
    architecture = architecture_of(config)
    if config.get("architectures"):
        kind = config["architectures"][0]
    name = str(config.get("_name_or_path") or "") or f"{kind} of {path}"
    model = from_architecture(name, f"{path} ({kind})", architecture)
    if architecture.logits or "_class_name" in config:
        return model
    note = "It has no head: what the loss on top of it keeps is not counted."
    return replace(model, notes=(note,))
