"""The models: a byte-level GPT-2 and a ViT, from transformers, with new weights."""

from __future__ import annotations

from typing import Any

import torch

from .config import TaskConfig


def build_model(task: TaskConfig) -> torch.nn.Module:
    """Build the task's model with weights drawn from torch's generator.

    No dropout: the runs are short, and every optimizer then sees the same function. GELU is the
    variant that torch has in one kernel.
    """
    if task.kind == "text":
        return _gpt(task)
    if task.kind == "vision":
        return _vit(task)
    raise ValueError(f"task kind: got {task.kind!r}, expected 'text' or 'vision'")


def logits(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the model's scores: (batch, context, 256) for text, (batch, 10) for images."""
    output = model(inputs)
    scores: torch.Tensor = output.logits
    return scores


def describe(task: TaskConfig) -> str:
    """Name the model in a few words."""
    size = f"{task.layers} layers × {task.width}"
    if task.kind == "text":
        return f"byte-level GPT-2, {size}, context {task.context}"
    return f"ViT, {size}, patches of 4×4"


def _gpt(task: TaskConfig) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=task.context,
        n_embd=task.width,
        n_layer=task.layers,
        n_head=task.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: torch.nn.Module = GPT2LMHeadModel(config)
    return model


def _vit(task: TaskConfig) -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=4 * task.width,
        hidden_act="gelu",
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    model: torch.nn.Module = ViTForImageClassification(config)
    return model
