"""Architectures from a Hugging Face ``config.json``.

Only families whose shapes the tests compare with transformers' own modules are accepted.  A key
that a file leaves out has the value that transformers' configuration class would give it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .decoders import Decoder
from .gpt import GPT2, GPTNeoX
from .model import Architecture, Model, from_architecture
from .sana import Sana

Config = Mapping[str, Any]

_OTHER_WAY = (
    "Give the model's .safetensors file, its model.safetensors.index.json or the folder they are "
    "in: the shapes are read from their headers, whatever the architecture."
)


class UnknownModel(ValueError):
    """The model is not one that the planner knows; the message says which it knows."""


def _get(config: Config, key: str) -> Any:
    """A size that has to be there."""
    if config.get(key) is None:
        raise ValueError(f"the configuration lacks {key!r}, which its kind of model needs")
    return config[key]


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
        heads, hidden = int(_get(config, "num_attention_heads")), int(_get(config, "hidden_size"))
        kv_heads = config.get("num_key_value_heads")
        if kv_heads is None:
            kv_heads = _get(config, "num_key_value_heads") if kv_required else heads
        head_dim = config.get("head_dim") if has_head_dim else None
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
        return Decoder(
            layers=int(_get(config, "num_hidden_layers")),
            hidden=hidden,
            feed_forward=int(_get(config, "intermediate_size")),
            heads=heads,
            kv_heads=int(kv_heads),
            head_dim=int(head_dim or head_dim_default or hidden // heads),
            vocabulary=int(_get(config, "vocab_size")),
            mlp_bias=mlp_bias,
            **habits,
        )

    return read


def _gpt2(config: Config) -> GPT2:
    if config.get("add_cross_attention"):
        raise UnknownModel(f"a GPT-2 with cross-attention is not known. {_OTHER_WAY}")
    hidden = int(config.get("n_embd") or _get(config, "hidden_size"))
    dropouts = [float(config.get(key, 0.1)) for key in ("resid_pdrop", "embd_pdrop")]
    return GPT2(
        layers=int(config.get("n_layer") or _get(config, "num_hidden_layers")),
        hidden=hidden,
        feed_forward=int(config.get("n_inner") or 4 * hidden),
        heads=int(config.get("n_head") or _get(config, "num_attention_heads")),
        vocabulary=int(_get(config, "vocab_size")),
        positions=int(config.get("n_positions") or _get(config, "max_position_embeddings")),
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout=any(dropouts),
        python_gelu=config.get("activation_function", "gelu_new") == "gelu_new",
    )


def _gpt_neox(config: Config) -> GPTNeoX:
    return GPTNeoX(
        layers=int(_get(config, "num_hidden_layers")),
        hidden=int(_get(config, "hidden_size")),
        feed_forward=int(_get(config, "intermediate_size")),
        heads=int(_get(config, "num_attention_heads")),
        vocabulary=int(_get(config, "vocab_size")),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", True)),
        parallel=bool(config.get("use_parallel_residual", True)),
        dropout=bool(config.get("hidden_dropout")),
    )


def _sana(config: Config) -> Sana:
    if config.get("interpolation_scale") is not None or config.get("norm_elementwise_affine"):
        raise UnknownModel(
            "a SANA with interpolation_scale or norm_elementwise_affine is not known. " + _OTHER_WAY
        )
    ratio = config.get("mlp_ratio", config.get("expand_ratio"))
    in_channels = int(config.get("in_channels") or 32)
    return Sana(
        layers=int(_get(config, "num_layers")),
        heads=int(_get(config, "num_attention_heads")),
        head_dim=int(_get(config, "attention_head_dim")),
        cross_heads=int(_get(config, "num_cross_attention_heads")),
        cross_head_dim=int(_get(config, "cross_attention_head_dim")),
        caption_channels=int(_get(config, "caption_channels")),
        expansion=float(2.5 if ratio is None else ratio),
        in_channels=in_channels,
        out_channels=int(config.get("out_channels") or in_channels),
        patch_size=int(config.get("patch_size") or 1),
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
        UnknownModel: the kind of model is not one of :data:`FAMILIES`.
        ValueError: a size is missing, or is not a number.
    """
    kind = config.get("model_type") or config.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = f"got a model of type {kind!r}" if kind else "the configuration names no model_type"
        raise UnknownModel(f"{said}; known are {', '.join(FAMILIES)}. {_OTHER_WAY}")
    quantized = config.get("quantization_config")
    if quantized:
        raise UnknownModel(
            "the configuration is that of a quantized model, which does not train as it is; give "
            "the one of the original model"
        )
    try:
        return FAMILIES[kind](config)
    except (TypeError, ZeroDivisionError) as error:
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
    name = str(config.get("_name_or_path") or "") or f"{kind} of {path}"
    return from_architecture(name, f"{path} ({kind})", architecture_of(config))
