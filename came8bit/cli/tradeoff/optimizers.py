"""The optimizers that are compared: how each is built, and whether it can be."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from came8bit.errors import CliError

Parameters = Iterable[torch.nn.Parameter]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        label: Its name in tables and pictures.
        package: The PyPI package to install if it is missing.
        module, attribute: Where its class is found.
        slow_on_cpu: Whether its step has no fast CPU implementation.
        extra: Arguments of the class besides parameters, learning rate and weight decay.
    """

    label: str
    package: str
    module: str
    attribute: str
    slow_on_cpu: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import the package and return the class."""
        return getattr(importlib.import_module(self.module), self.attribute)

    def build(self, params: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Make the optimizer."""
        made: torch.optim.Optimizer = self.load()(
            params, lr=lr, weight_decay=weight_decay, **self.extra
        )
        return made


#: Keys are the names on the command line. AdamW is the fused one: the fastest torch has.
OPTIMIZERS = {
    "adamw": OptimizerSpec("AdamW", "torch", "torch.optim", "AdamW", False, {"fused": True}),
    "adamw8bit": OptimizerSpec(
        "AdamW8bit", "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", True
    ),
    "came-pytorch": OptimizerSpec(
        "came-pytorch", "came-pytorch==0.1.3", "came_pytorch", "CAME", True
    ),
    "came": OptimizerSpec("CAME", "came8bit", "came8bit", "CAME", False),
    "came8bit": OptimizerSpec("CAME8bit", "came8bit", "came8bit", "CAME8bit", False),
}


def label(name: str) -> str:
    """Return the optimizer's name for readers."""
    return OPTIMIZERS[name].label


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as given, once each; raises CliError that lists the known ones otherwise."""
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise CliError(
            f"unknown optimizer {', '.join(map(repr, unknown))}; known: {', '.join(OPTIMIZERS)}"
        )
    return tuple(dict.fromkeys(names))


def why_unavailable(name: str) -> str | None:
    """Return why the optimizer cannot be run here and what to do, or None if it is installed.

    Looks only whether the package is there. One that is there and cannot be imported is a failure
    of the run, not something to skip.
    """
    spec = OPTIMIZERS[name]
    if importlib.util.find_spec(spec.module.partition(".")[0]) is None:
        return f"not installed: pip install '{spec.package}'"
    return None
