"""The optimizers of the capped job, and the two ways of stepping: ordinary, or in backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import came8bit

NONE = "none"
"""No optimizer: gradients are thrown away. What the model needs by itself."""

OPTIMIZERS = ("CAME8bit", "PagedCAME8bit", "PagedAdamW8bit", "AdamW")
OURS = {"CAME8bit", "PagedCAME8bit"}
LR, LR_WIDTH = 3e-5, 4096
"""Learning rate of all of them at this width; narrower models take more in proportion.

There is no time for a warm-up, so CAME runs with ``bias_correction``, and with AdamW's rate.
"""

PLANNED = {
    "CAME8bit": "came8bit",
    "PagedCAME8bit": "paged-came8bit",
    "PagedAdamW8bit": "paged-adamw8bit",
    "AdamW": "adamw-fused",
}
"""Keys of ``came8bit.planner.OPTIMIZERS``."""


@dataclass(frozen=True)
class Choice:
    """An optimizer and how it steps.

    Attributes:
        name: of :data:`OPTIMIZERS`, or :data:`NONE`.
        released: step in backward and free each gradient at once.
        page_budget: of ``PagedCAME8bit``; None: its default.
        page_dir: of ``PagedCAME8bit``; None: pinned memory, or a file without a name.
    """

    name: str
    released: bool
    page_budget: int | None = None
    page_dir: str | None = None


class Stepping:
    """An optimizer, or one for each parameter, at work on a model.

    Attributes:
        optimizers: all there are.
    """

    def __init__(self, choice: Choice, model: torch.nn.Module) -> None:
        self.choice = choice
        self._params = list(model.parameters())
        self._handles: list[Any] = []
        config: Any = model.config
        lr = LR * LR_WIDTH / config.hidden_size
        if choice.name == NONE:
            self.optimizers: list[torch.optim.Optimizer] = []
        elif choice.name in OURS or not choice.released:
            self.optimizers = [_make(choice, list(model.named_parameters()), lr)]
        else:  # theirs cannot step a single one of their parameters
            self.optimizers = [_make(choice, [named], lr) for named in model.named_parameters()]
        self.attach()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only one.

        Raises:
            ValueError: there is one for each parameter, or none.
        """
        (only,) = self.optimizers
        return only

    def attach(self) -> None:
        """Step in backward from now on, if that is the way."""
        name, released = self.choice.name, self.choice.released
        if name in OURS and released:
            self._handles = [came8bit.step_in_backward(self.optimizer)]
        elif name == NONE:
            self._handles = [
                param.register_post_accumulate_grad_hook(_drop) for param in self._params
            ]
        elif released:
            self._handles = [
                param.register_post_accumulate_grad_hook(_hook(optimizer))
                for param, optimizer in zip(self._params, self.optimizers, strict=True)
            ]

    def detach(self) -> None:
        """Let another one step the same parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def after_backward(self) -> None:
        """End the step; without release it is the whole step."""
        if self.choice.name in OURS or not self.choice.released:
            for optimizer in self.optimizers:
                optimizer.step()
        if not self.choice.released:
            for param in self._params:
                param.grad = None


def _drop(param: Tensor) -> None:
    param.grad = None


def _hook(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        optimizer.step()
        param.grad = None

    return hook


def _make(
    choice: Choice, named: list[tuple[str, torch.nn.Parameter]], lr: float
) -> torch.optim.Optimizer:
    name = choice.name
    if name == "CAME8bit":
        return came8bit.CAME8bit(named, lr=lr, bias_correction=True)
    if name == "PagedCAME8bit":
        return came8bit.PagedCAME8bit(
            named,
            lr=lr,
            bias_correction=True,
            page_budget=choice.page_budget,
            page_dir=choice.page_dir,
        )
    params = [param for _, param in named]
    if name == "AdamW":
        return torch.optim.AdamW(params, lr=lr, fused=True)
    if name != "PagedAdamW8bit":
        raise ValueError(f"got optimizer {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    from bitsandbytes.optim import PagedAdamW8bit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU it does not page; the benchmark says so itself
        made: torch.optim.Optimizer = PagedAdamW8bit(params, lr=lr)
    return made


# --- what is where --------------------------------------------------------------------------------


def managed_bytes() -> int:
    """Bytes that bitsandbytes has in CUDA managed memory, wherever they are at the moment."""
    from bitsandbytes.functional import GlobalPageManager

    paged = GlobalPageManager.get_instance().paged_tensors
    return sum(tensor.nbytes for tensor in paged)


def paged_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of all pages of one of ours, of those that move in each step, and of the device's."""
    pager = getattr(optimizer._store, "pager", None)
    found = {"pages": 0, "moved": 0, "staging": 0}
    for device in pager._by_device.values() if pager else ():
        sizes, schedule = {k: p.nbytes for k, p in device.pages.items()}, device._schedule
        found["pages"] += sum(sizes.values())
        found["moved"] += sum(
            n for key, n in sizes.items() if not schedule or key not in schedule.kept
        )
        found["staging"] += schedule.capacity if schedule else 0
    return found
