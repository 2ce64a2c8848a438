"""LLaMA-Factory v1: import this module, then ``optim_config: {name: came8bit, ...}``."""

from __future__ import annotations

from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

from ..optim import CAME


@OptimizerPlugin("came8bit").register()
def create_came8bit_optimizer(model: Any, optim_config: Any) -> CAME:
    """Return CAME with the options in ``optim_config``, 8 bits unless they say otherwise."""
    options = {"optim_bits": 8, **{k: v for k, v in optim_config.items() if k != "name"}}
    return CAME([item for item in model.named_parameters() if item[1].requires_grad], **options)
