"""The optimizers of the benchmarks of single steps: ours and those they are compared with."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import Params


@dataclass(frozen=True)
class Peer:
    """An optimizer: the module it comes from, its name there, its options."""

    module: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Params) -> torch.optim.Optimizer:
        """Return a new one."""
        kind = getattr(importlib.import_module(self.module), self.name)
        made: torch.optim.Optimizer = kind(params, lr=1e-5, weight_decay=0.01, **self.options)
        return made

    def missing(self) -> str:
        """Return why it cannot be measured, or ''."""
        package = self.module.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        try:
            importlib.import_module(self.module)
        except Exception as error:
            return f"{package} cannot be imported: {type(error).__name__}: {error}"
        return ""


ADAMW, FOREACH = "AdamW(fused)", "AdamW(foreach)"
OURS, BITSANDBYTES = "CAME8bit", "bitsandbytes AdamW8bit"
PEERS = {
    ADAMW: Peer("torch.optim", "AdamW", {"fused": True}),
    FOREACH: Peer("torch.optim", "AdamW", {"foreach": True}),
    OURS: Peer("came8bit", "CAME8bit"),
    "CAME8bit nearest": Peer("came8bit", "CAME8bit", {"rounding": "nearest"}),
    "CAME32bit": Peer("came8bit", "CAME32bit"),
    "CAME4bit": Peer("came8bit", "CAME4bit"),
    "CAME2bit": Peer("came8bit", "CAME2bit"),
    "came-pytorch": Peer("came_pytorch", "CAME"),
    BITSANDBYTES: Peer("bitsandbytes.optim", "AdamW8bit"),
    # Its path for CAME; the values are those of its own preset.
    "adafactor8bit CAME": Peer(
        "adafactor8bit",
        "Adafactor8Bit",
        dict(
            beta1=0.9,
            beta2=0.999,
            beta2_decay=None,
            beta3=0.9999,
            factored=True,
            relative_step=False,
            scale_parameter=False,
            scale_weight_decay=False,
            d=1.0,
        ),
    ),
    "torchao AdamW8bit": Peer("torchao.optim", "AdamW8bit"),
}
