"""A callback for the Trainer of transformers, and of its subclasses."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from ..optim import CAME
from ..step_in_backward import GradientRelease, step_in_backward


class CAMECallback(TrainerCallback):
    """Log what the optimizer counts, and step in backward on request.

    ``skipped_steps`` joins the loss in the log. Callbacks that report it have to come after this
    one: use :meth:`attach` in place of ``callbacks=[...]`` for them.

    Args:
        step_in_backward: update each parameter in the backward pass; the gradients of all but the
            last of ``gradient_accumulation_steps`` add up first. Needs ``max_grad_norm=0``.
    """

    def __init__(self, step_in_backward: bool = False) -> None:
        self._wanted = step_in_backward
        self._release: GradientRelease | None = None
        self._accumulating = ExitStack()
        self._parts = 0  # of the step under way that have not come yet

    def attach(self, trainer: Any) -> CAMECallback:
        """Make this the first callback of ``trainer``, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, *_: Any, **known: Any) -> None:
        """Begin to step in backward."""
        if self._wanted and args.max_grad_norm:
            raise ValueError(
                f"got max_grad_norm={args.max_grad_norm!r} and step_in_backward, which cannot "
                "clip; set max_grad_norm=0 (CAME clips the update of each parameter itself)"
            )
        if self._wanted:
            self._release = step_in_backward(known["optimizer"])

    def on_step_begin(self, args: Any, *_: Any, **__: Any) -> None:
        """Accumulate all but the last part of the step."""
        self._parts = args.gradient_accumulation_steps
        if self._release is not None and self._parts > 1:
            self._accumulating.enter_context(self._release.accumulate())

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Let the last part update."""
        self._parts -= 1
        if self._parts == 1:
            self._accumulating.close()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Close a step that had fewer parts, as at the end of an epoch."""
        self._accumulating.close()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Return to ordinary steps."""
        if self._release is not None:
            self._release.remove()
            self._release = None

    def on_log(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Add ``skipped_steps`` to the log of the loss."""
        logs, optimizer = known["logs"], known["optimizer"]
        while not isinstance(optimizer, CAME) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if "loss" in logs and isinstance(optimizer, CAME):
            count = optimizer.skipped_steps()
            logs["skipped_steps"] = state.log_history[-1]["skipped_steps"] = count
