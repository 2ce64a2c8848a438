"""What the capped job trains: Llamas with random weights, and batches of real text as bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from came8bit.planner import CONFIGS
from came8bit.tradeoff.data import Text, load_text

HEAD = 64  # width of an attention head in the scaled shapes


def scaled(config: dict[str, Any], divisor: int) -> dict[str, Any]:
    """Return ``config`` narrower by ``divisor``, with ``divisor / 2`` times fewer layers."""
    hidden = config["hidden_size"] // divisor
    heads = hidden // HEAD
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    return {
        **config,
        "hidden_size": hidden,
        "intermediate_size": config["intermediate_size"] // divisor,
        "num_hidden_layers": config["num_hidden_layers"] * 2 // divisor,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // shared),
        "vocab_size": config["vocab_size"] // divisor,
    }


_FULL = ("llama-7b", "llama-8b", "llama-1b")
SHAPES: dict[str, dict[str, Any]] = {
    **{name: CONFIGS[name][1] for name in _FULL},
    **{
        f"{name}/{divisor}": scaled(CONFIGS[name][1], divisor)
        for name in _FULL
        for divisor in (8, 16)
    },
}
"""Keys of the published config.json; ``/8`` and ``/16`` are scaled down."""


def build(shape: str, device: torch.device, seed: int) -> torch.nn.Module:
    """Return a Llama of ``shape`` with random weights and activation checkpointing, ready to train.

    Parameters are made as bf16 on ``device``: at no time is there a copy in fp32 or on the host.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{key: value for key, value in SHAPES[shape].items() if key != "model_type"},
        use_cache=False,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has another name from version 6 on
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained: torch.nn.Module = model.train()
    return trained


def loss_of(model: torch.nn.Module, tokens: Tensor, piece: int) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        model: from :func:`build`.
        tokens: int64, batch × (sequence + 1).
        piece: tokens whose logits exist at once; they are computed again in the backward.
    """
    inner: Any = model
    targets = tokens[:, 1:].flatten()
    hidden = inner.model(input_ids=tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    sums = [
        checkpoint(_summed_loss, inner.lm_head, some, wanted, use_reentrant=False)
        for some, wanted in zip(hidden.split(piece), targets.split(piece), strict=True)
    ]
    mean: Tensor = torch.stack(sums).sum() / targets.numel()
    return mean


def _summed_loss(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


class Batches:
    """Windows of text, each byte a token; a function of the seed and the number of the step."""

    def __init__(self, text: Text, batch: int, sequence: int, seed: int) -> None:
        self._text, self._batch, self._sequence, self._seed = text, batch, sequence, seed

    def __call__(self, step: int) -> Tensor:
        """Tokens of a step, int64, batch × (sequence + 1)."""
        return self._windows(self._text.train, [self._seed, step])

    def held_out(self) -> Tensor:
        """Tokens that are never trained on; always the same."""
        return self._windows(self._text.validation, [self._seed])

    def _windows(self, data: np.ndarray, seed: list[int]) -> Tensor:
        length = self._sequence + 1
        starts = np.random.default_rng(seed).integers(0, len(data) - length + 1, self._batch)
        return torch.from_numpy(np.stack([data[i : i + length] for i in starts]).astype(np.int64))


def text(corpus: str, folder: Path) -> Text:
    """Return the corpus; ``stdlib``, the sources of Python's library, is on every machine."""
    return load_text(None, corpus, folder)
