"""A plugin for axolotl: ``plugins: [came8bit.integrations.axolotl.CAME8bitPlugin]``."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from ..optim import CAME


class CAME8bitPlugin(BasePlugin):
    """Train with CAME, 8 bits unless ``optim_args`` say otherwise.

    From the configuration come ``learning_rate``, ``weight_decay``, ``adam_beta1`` to
    ``adam_beta3`` and ``optim_args``, a mapping or ``"name=value,name=value"``. The value of
    ``optimizer`` has no effect; leave it at ``adamw_torch``.
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Name class and options to the trainer, before it makes its optimizer."""
        trainer.optimizer_cls_and_kwargs = CAME, options_of(cfg)


def options_of(cfg: Any) -> dict[str, Any]:
    """Return the options of the optimizer that ``cfg`` asks for."""
    options: dict[str, Any] = {"lr": cfg.learning_rate, "optim_bits": 8}
    if cfg.weight_decay is not None:
        options["weight_decay"] = cfg.weight_decay
    betas = (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_beta3)
    if any(beta is not None for beta in betas):
        defaults = (0.9, 0.999, 0.9999)
        options["betas"] = tuple(
            d if b is None else b for b, d in zip(betas, defaults, strict=True)
        )
    extra = cfg.optim_args or {}
    if isinstance(extra, str):
        extra = dict(pair.strip().split("=", 1) for pair in extra.split(","))
    return {**options, **extra}
