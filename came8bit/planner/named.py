"""Models by name: the sizes of their published config.json."""

from __future__ import annotations

from typing import Any

from ..errors import UnknownModel
from .configs import architecture_of
from .model import Model, from_architecture


def _llama(
    hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
        **more,
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 50_257,
        "n_positions": 1024,
    }


_LLAMA_3 = {"vocab_size": 128_256}

#: name -> (what it is, the keys of its config.json that decide shapes)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT-2 small", _gpt2(768, 12, 12)),
    "gpt2-medium": ("GPT-2 medium", _gpt2(1024, 24, 16)),
    "gpt2-large": ("GPT-2 large", _gpt2(1280, 36, 20)),
    "gpt2-xl": ("GPT-2 XL", _gpt2(1600, 48, 25)),
    "tinyllama-1.1b": ("TinyLlama 1.1B", _llama(2048, 5632, 22, 32, 4)),
    "llama-1b": (
        "Llama 3.2 1B",
        _llama(2048, 8192, 16, 32, 8, **{**_LLAMA_3, "tie_word_embeddings": True}),
    ),
    "llama-3b": (
        "Llama 3.2 3B",
        _llama(3072, 8192, 28, 24, 8, **{**_LLAMA_3, "tie_word_embeddings": True}),
    ),
    "llama-7b": ("Llama 2 7B", _llama(4096, 11_008, 32, 32, 32)),
    "llama-8b": ("Llama 3 and 3.1 8B", _llama(4096, 14_336, 32, 32, 8, **_LLAMA_3)),
    "llama-13b": ("Llama 2 13B", _llama(5120, 13_824, 40, 40, 40)),
    "mistral-7b": (
        "Mistral 7B v0.1",
        {**_llama(4096, 14_336, 32, 32, 8), "model_type": "mistral"},
    ),
    "qwen2.5-0.5b": (
        "Qwen2.5 0.5B",
        {
            **_llama(896, 4864, 24, 14, 2),
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-1.5b": (
        "Qwen2.5 1.5B",
        {
            **_llama(1536, 8960, 28, 12, 2),
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        "Qwen2.5 7B",
        {**_llama(3584, 18_944, 28, 28, 4), "model_type": "qwen2", "vocab_size": 152_064},
    ),
    "gemma-2b": (
        "Gemma 2B",
        {
            **_llama(2048, 16_384, 18, 8, 1),
            "model_type": "gemma",
            "head_dim": 256,
            "vocab_size": 256_000,
            "tie_word_embeddings": True,
        },
    ),
    "sana-1.6b": (
        "SANA 1.6B, the transformer",
        {
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
        },
    ),
}


def named(name: str) -> Model:
    """The model called ``name``.

    Raises:
        UnknownModel: there is none; the message lists the names.
    """
    if name not in CONFIGS:
        raise UnknownModel(f"there is no model called {name!r}; names are {', '.join(CONFIGS)}")
    title, config = CONFIGS[name]
    return from_architecture(name, f"{title}, sizes as published", architecture_of(config))
