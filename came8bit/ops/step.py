"""The step loop: from parameters that have something to do to a handful of operator calls."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from ..reference.quant import slice_shape
from ..state.layout import Group
from ..state.store import Run, StepItem
from . import schema
from .reference_step import needs_reference, reference_step

_LOOK_EVERY = 16  # steps between two looks at the skip counters

_FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "rms_ratio")
_UNFACTORED = ("exp_avg_sq",)
_COUNTERS = ("step", "skipped")
# (factored, coded) -> the state tensors in the order of the operator's arguments
_COLUMNS = {
    (True, True): itemgetter("exp_avg", "absmax", *_FACTORED, *_COUNTERS),
    (True, False): itemgetter("exp_avg", *_FACTORED, *_COUNTERS),
    (False, True): itemgetter("exp_avg", "absmax", *_UNFACTORED, *_COUNTERS),
    (False, False): itemgetter("exp_avg", *_UNFACTORED, *_COUNTERS),
}


class _Bucket:
    """Arguments of one operator call: parameters of one kind on one device."""

    __slots__ = ("grads", "params", "states", "views")

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.views: list[int] = []


def step_group(
    group: Group, items: Sequence[StepItem], visit: Callable[[Sequence[StepItem], Run], None]
) -> None:
    """Update the parameters of one group.

    Args:
        group: the options.
        items: what to do, prepared by the store.
        visit: of the store; calls back with complete state.

    Raises:
        FloatingPointError: ``nonfinite="raise"`` and an update is not finite.
    """
    strict = group["nonfinite"] == "raise"
    before = _skipped(items) if strict else []
    visit(items, partial(_call_operators, group))
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
            stacklevel=4,
        )


def _total(counters: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors on one device."""
    return torch.stack(list(counters)).sum()


def _skipped(members: Iterable[StepItem]) -> list[Tensor]:
    """Skips counted so far, by device."""
    counters: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for item in members:
        counters[item.param.device].append(item.state["skipped"])
    return [_total(column) for column in counters.values()]


def _call_operators(group: Group, members: Sequence[StepItem]) -> None:
    """One operator call per kind of parameter and device."""
    option = needs_reference(group)
    if option is not None:
        reference_step(group, members, option)
        return
    buckets: defaultdict[tuple[torch.device, bool, bool], _Bucket] = defaultdict(_Bucket)
    for param, grad, state, position in members:
        row = state.get("exp_avg_sq_row")
        bucket = buckets[param.device, row is not None, "absmax" in state]
        bucket.params.append(param)
        bucket.grads.append(grad)
        bucket.states.append(state)
        if row is None:
            bucket.views += (1, *slice_shape(param.shape), position, 0)
        else:
            bucket.views += (*row.shape, state["exp_avg_sq_col"].shape[1], position, 0)
    lr = group["lr"]
    tensor_lr = lr.detach().reshape(()) if isinstance(lr, Tensor) else None
    hyper = [
        *map(float, (*group["betas"], *group["eps"], group["clip_threshold"])),
        float(lr) if tensor_lr is None else 0.0,
        float(group["weight_decay"]),
    ]
    options = [
        int(group["rounding"] == "stochastic"),
        int(group["cautious"]),
        int(group["nonfinite"] == "propagate"),
        int(group["maximize"]),
        int(group["bias_correction"]),
        int(group["seed"]),
    ]
    for (device, factored, coded), bucket in buckets.items():
        columns = [
            list(column)
            for column in zip(*map(_COLUMNS[factored, coded], bucket.states), strict=True)
        ]
        if not coded:
            columns.insert(1, [])
        if tensor_lr is not None:
            tensor_lr = tensor_lr.to(device, torch.float32, non_blocking=True)
        operator = schema.factored_step_ if factored else schema.unfactored_step_
        operator(bucket.params, bucket.grads, *columns, bucket.views, tensor_lr, hyper, options)
        # A kernel writes past autograd: a graph that still needs the old values has to notice.
        torch.autograd.graph.increment_version(bucket.params)
