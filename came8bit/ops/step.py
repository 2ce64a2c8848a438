"""The step loop: from parameters that have something to do to a handful of operator calls."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.rungs import RUNGS, rung_of
from ..state.layout import Group
from ..state.store import Run, StateStore, StepItem, stream_of
from ..validation import moved_error, unusable_error, usable
from . import libraries, schema

_LOOK_EVERY = 16  # steps between two looks at the skip counters

_MOMENTS = ("exp_avg", "step", "skipped")
_UNFACTORED = (*_MOMENTS, "exp_avg_sq")
_FACTORED = (
    *_MOMENTS,
    *("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "rms_ratio"),
)


def collect_one(
    store: StateStore, param: Tensor, group: Group, position: int, first: int
) -> StepItem | None:
    """Check and return what a step needs of ``param``, None if there is nothing to do.

    Args:
        store: of the optimizer.
        param: a member of ``group``.
        position: of ``param`` in the optimizer, ``first`` that of the group's first member.

    Raises:
        ValueError, TypeError: the gradient, or the state in ``store``, does not fit the parameter.
    """
    grad = param.grad
    if grad is None:
        return None
    if not usable(param, grad):
        raise unusable_error(param, grad, position)
    state = store.state.get(param) or {}
    if state and not store.fits(param):
        raise moved_error(param, state, store.shape_of(param), position)
    if not param.numel():
        return None
    if grad.dtype == torch.float64:
        grad = grad.to(torch.float32)
    return StepItem(param, grad, state, position, stream_of(group, position, first))


def moves(group: Group, item: StepItem) -> bool:
    """Return whether ``item`` is more than an occasion to make state.

    Tools that save or shard state before training (``get_optimizer_state_dict``) take a step with
    gradients of zero and a learning rate of 0. It must not count as the first, which bias
    correction and the statistics would remember.
    """
    if item.state:
        return True
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else 1.0
    return bool(lr) or bool(item.grad.any())


def step_group(
    group: Group,
    items: Sequence[StepItem],
    visit: Callable[[Sequence[StepItem], Run], None],
    squares: dict[int, Tensor],
) -> None:
    """Update the parameters of one group.

    Args:
        group: the options.
        items: what to do, prepared by the store.
        visit: of the store; calls back with complete state.
        squares: of each operator call, by the position of its first parameter, the sums of squares
            of the gradients; added to.

    Raises:
        FloatingPointError: ``nonfinite="raise"`` and an update is not finite.
    """
    strict = group["nonfinite"] == "raise"
    before = _skipped(items) if strict else []
    visit(items, partial(_call_operators, group, squares))
    after = _skipped(items) if strict else []
    if any(int(new - old) for new, old in zip(after, before, strict=True)):
        others = ", others have been updated" if len(items) > 1 else ""
        raise FloatingPointError(
            "the preconditioned gradient of a parameter is not finite although its "
            f"gradient is; that parameter was left alone{others}. Lower the loss scale or clip "
            "gradients"
        )


class SkipWarning:
    """Warns late, at 1, 10, 100, ... skipped updates, and only about counters in CPU memory.

    Reading a counter on an accelerator would wait for it; there, ask ``skipped_steps()``.
    """

    def __init__(self) -> None:
        self._steps_until_look = _LOOK_EVERY
        self._warn_from = 1

    def look(self, optimizer: object, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Note a step of ``optimizer``, whose state is ``states``, and warn if it is time to."""
        self._steps_until_look -= 1
        if self._steps_until_look > 0:
            return
        self._steps_until_look = _LOOK_EVERY
        counters = [state["skipped"] for state in states if "skipped" in state]
        counters = [counter for counter in counters if counter.device.type == "cpu"]
        skipped = int(_total(counters)) if counters else 0
        if skipped < self._warn_from:
            return
        while self._warn_from <= skipped:
            self._warn_from *= 10
        warnings.warn(
            f"{type(optimizer).__name__}: {skipped} updates of single parameters have been skipped "
            "so far because the gradient was not finite; see skipped_steps() and the option "
            "nonfinite",
            RuntimeWarning,
            stacklevel=6,
        )


def _total(counters: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors on one device."""
    return torch.stack(list(counters)).sum()


def _skipped(members: Iterable[StepItem]) -> list[Tensor]:
    """Return the skips counted so far, by device."""
    counters: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for item in members:
        counters[item.param.device].append(item.state["skipped"])
    return [_total(column) for column in counters.values()]


def _call_operators(group: Group, squares: dict[int, Tensor], members: Sequence[StepItem]) -> None:
    """Make one operator call per kind of parameter and device."""
    buckets: defaultdict[tuple[torch.device, bool, int], list[StepItem]] = defaultdict(list)
    for item in members:
        state = item.state
        bits = 8 if "absmax" in state else 32
        if "scales" in state:
            rung = rung_of(state["exp_avg"], state["scales"])
            bits = rung.bits if rung else 32
        buckets[item.param.device, "exp_avg_sq_row" in state, bits].append(item)
    scalars = _scalars(group)
    for (device, factored, bits), items in buckets.items():
        states = [item.state for item in items]
        names = _FACTORED if factored else _UNFACTORED
        buffers = {name: [state[name] for state in states] for name in names}
        scales = RUNGS[bits].scales_name if bits in RUNGS else ""
        buffers["absmax"] = [state[scales] for state in states] if scales else []
        if scalars["lr_tensor"] is not None:
            rate = scalars["lr_tensor"].to(device, torch.float32, non_blocking=True)
            scalars["lr_tensor"] = rate
        operator: Callable[..., None] = (
            schema.factored_step_ if factored else schema.unfactored_step_
        )
        options = {**group, "optim_bits": bits}
        if libraries.needs_reference(options, device.type):
            operator = schema.BY_REFERENCE[operator]
        params = [item.param for item in items]
        totals = torch.empty(len(items), dtype=torch.float32, device=device)
        operator(
            params=params,
            grads=[item.grad for item in items],
            **buffers,
            param_index=[item.stream for item in items],
            element_offset=[0] * len(items),
            **scalars,
            grad_squares=totals,
        )
        squares[items[0].position] = totals
        # A kernel writes past autograd: a graph that still needs the old values has to notice.
        torch.autograd.graph.increment_version(params)


def _scalars(group: Group) -> dict[str, Any]:
    """Return the scalar arguments of an operator, by name."""
    lr, (beta1, beta2, beta3), (eps1, eps2) = group["lr"], group["betas"], group["eps"]
    is_tensor = isinstance(lr, Tensor)
    return {
        "lr_tensor": lr.detach().reshape(()) if is_tensor else None,
        "lr": 0.0 if is_tensor else float(lr),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "beta3": float(beta3),
        "eps1": float(eps1),
        "eps2": float(eps2),
        "clip_threshold": float(group["clip_threshold"]),
        "weight_decay": float(group["weight_decay"]),
        "stochastic": group["rounding"] == "stochastic",
        "cautious": bool(group["cautious"]),
        "propagate": group["nonfinite"] == "propagate",
        "maximize": bool(group["maximize"]),
        "bias_correction": bool(group["bias_correction"]),
        "nesterov": bool(group["nesterov"]),
        "seed": int(group["seed"]),
    }
