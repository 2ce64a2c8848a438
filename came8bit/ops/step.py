"""The step loop: from parameters that have something to do to a handful of operator calls."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FRESH, listed
from ..reference.rungs import RUNGS, momentum_fits, rung_of
from ..state.layout import Group, find_fault
from ..state.sharding import is_sharded, local
from ..state.store import StateStore, StepItem, Work, stream_of
from ..validation import check_options, moved_error, unusable_error, usable
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
    return next(iter(_items(store, group, [(position, param)], first)), None)


def collect(store: StateStore, groups: Sequence[Group]) -> list[tuple[Group, list[StepItem]]]:
    """Check options, and collect what a step of all ``groups`` needs; raises as collect_one."""
    work: list[tuple[Group, list[StepItem]]] = []
    first = 0
    for group in groups:
        check_options(group)
        work.append((group, _items(store, group, enumerate(group["params"], first), first)))
        first += len(group["params"])
    return work


def _items(
    store: StateStore, group: Group, params: Iterable[tuple[int, Tensor]], first: int
) -> list[StepItem]:
    """Return what :func:`collect_one` does of members of ``group``, given with their positions.

    One loop, as calls would take a good part of the time that a step has for a small parameter.
    """
    by_position = group["stream"] is None and not group.get("param_names")
    states, items = store.state, []
    for position, param in params:
        grad = param.grad
        if grad is None:
            continue
        shape = param.shape
        if not usable(param, grad, shape):
            raise unusable_error(param, grad, position)
        state = states.get(param) or {}
        if state and not momentum_fits(state, shape) and store.shape_of(param) != shape:
            raise moved_error(param, state, store.shape_of(param), position)
        if 0 in shape:
            continue
        if grad.dtype is torch.float64:
            grad = grad.to(torch.float32)
        stream = position if by_position else stream_of(group, position, first)
        items.append(StepItem(param, grad, state, position, stream))
    return items


def is_still(group: Group) -> bool:
    """Return whether the learning rate of ``group`` is 0, without waiting for a device."""
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return not on_device and float(lr) == 0


def is_new(item: StepItem) -> bool:
    """Return whether no step of the parameter has counted yet; waits for its device."""
    if item.grad.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not item.state or not int(local(item.state["step"]))


def step_group(
    group: Group, items: Sequence[StepItem], store: StateStore, squares: dict[int, Tensor]
) -> None:
    """Update the parameters of one group.

    Args:
        group: the options.
        items: what to do, prepared by the store.
        store: of the optimizer.
        squares: of each operator call, by the position of its first parameter, the sums of squares
            of the gradients; added to.

    Raises:
        FloatingPointError: ``nonfinite="raise"`` and an update is not finite.
    """
    strict = group["nonfinite"] == "raise"
    before = _skipped(items) if strict else []
    store.visit(items, partial(_call_operators, group, squares))
    after = _skipped(items) if strict else []
    if before == after:
        return
    for item, old, new in zip(items, before, after, strict=True):
        if new > old:
            fault = _fault_of(store, item.param)
            raise FloatingPointError(
                f"the update of parameter {item.position} is not finite although its gradient is"
                + (f": {fault}. {FRESH}" if fault else "; lower the loss scale or clip gradients")
                + ". That parameter was left alone, others of its group have been updated"
            )


def check_finite(work: Work, store: StateStore, groups: Sequence[Group]) -> None:
    """Look at the norms of the gradients where that is asked for; waits for each device once.

    Raises:
        FloatingPointError: some are not finite; the message lists them, and parameters and state
            that are not finite either and so may be the cause.
    """
    by_device: defaultdict[torch.device, list[StepItem]] = defaultdict(list)
    for group, items in work:
        for item in items:
            # All ranks have to look at what is sharded, at the same time.
            if group["nonfinite"] == "raise" and not is_sharded(item.param):
                by_device[item.grad.device].append(item)
    bad: list[str] = []
    for members in by_device.values():
        norms = torch._foreach_norm([item.grad for item in members], 2, torch.float32)
        finite = torch.stack(list(norms)).isfinite().tolist()
        bad += [
            f"{item.position} (shape {tuple(item.param.shape)})"
            for item, good in zip(members, finite, strict=True)
            if not good
        ]
    if bad:
        faults = _faults(store, groups)
        raise FloatingPointError(
            f"the gradient of parameter {listed(bad)} is not finite"
            + (
                f", probably because of {listed(faults)}. {FRESH}"
                if faults
                else '; nonfinite="skip" would leave such parameters out of the step'
            )
        )


def blame(store: StateStore, groups: Sequence[Group]) -> str:
    """Say why parameters have been skipped: for their state, for themselves, or for gradients."""
    faults = _faults(store, groups, only_skipped=True)
    if faults:
        return f"for what they are, not for their gradients: {listed(faults)}. {FRESH}"
    return "because the gradient was not finite; see skipped_steps() and the option nonfinite"


def _faults(store: StateStore, groups: Sequence[Group], *, only_skipped: bool = False) -> list[str]:
    """Say which parameters no step can go on from, and why."""
    faults, position = [], 0
    for group in groups:
        for param, name in zip(
            group["params"], group.get("param_names") or repeat(""), strict=False
        ):
            state = store.state.get(param) or {}
            asked = (
                int(state.get("skipped", 0)) if only_skipped else state or param.grad is not None
            )
            fault = _fault_of(store, param) if asked else None
            if fault:
                faults.append(f"parameter {position}{name and f' ({name})'}: {fault}")
            position += 1
    return faults


def _fault_of(store: StateStore, param: Tensor) -> str | None:
    """Say what is wrong with ``param`` and its state; of what is sharded, with the part here."""
    fault = find_fault({name: local(value) for name, value in store.read(param).items()})
    if fault is None and not bool(local(param).detach().isfinite().all()):
        return "its own values are not finite"
    return fault


class SkipWarning:
    """Warns late, at 1, 10, 100, ... skipped updates, and says what is to blame.

    After a step it looks at counters in CPU memory only, because reading one on an accelerator
    would wait for it; ``skipped_steps()`` does wait, and counts them all.
    """

    def __init__(self) -> None:
        self._steps_until_look = _LOOK_EVERY
        self._warn_from = 1

    def look(self, optimizer: object, store: StateStore, groups: Sequence[Group]) -> None:
        """Note a step of ``optimizer``, and warn if it is time to."""
        self._steps_until_look -= 1
        if self._steps_until_look <= 0:
            self._steps_until_look = _LOOK_EVERY
            self.note(count_skipped(store, "cpu"), optimizer, store, groups, stacklevel=7)

    def note(
        self,
        skipped: int,
        optimizer: object,
        store: StateStore,
        groups: Sequence[Group],
        stacklevel: int = 3,
    ) -> None:
        """Warn if so many skips have not been told of."""
        if skipped < self._warn_from:
            return
        while self._warn_from <= skipped:
            self._warn_from *= 10
        warnings.warn(
            f"{type(optimizer).__name__}: {skipped} updates of single parameters have been skipped "
            f"so far {blame(store, groups)}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


class CaptureWarning:
    """Warns once where a number has changed that a captured CUDA graph goes on using."""

    _FROZEN = ("lr", "betas", "eps", "clip_threshold", "weight_decay", "seed")

    def __init__(self) -> None:
        self._captured: list[dict[str, object]] = []

    def look(self, groups: Sequence[Group], stacklevel: int = 3) -> None:
        """Remember the numbers of ``groups`` if a graph is being captured, else compare."""
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if not (capturing or self._captured):
            return
        numbers = [
            {name: group[name] for name in self._FROZEN if not isinstance(group[name], Tensor)}
            for group in groups
        ]
        if capturing:
            self._captured = numbers
            return
        for i, (old, new) in enumerate(zip(self._captured, numbers, strict=False)):
            changed = [name for name in old if name in new and old[name] != new[name]]
            if changed:
                name = changed[0]
                self._captured = []
                warnings.warn(
                    f"group {i}: {name} is {new[name]!r}, but was {old[name]!r} when a CUDA graph "
                    "captured step(), and replays go on with that. Capture again, or make lr a "
                    "tensor and change it in place",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )
                return


def count_skipped(store: StateStore, device: str | None = None) -> int:
    """Count the skipped updates of all parameters, or of those on a type of ``device``."""
    counters = [state["skipped"] for state in store.state.values() if "skipped" in state]
    return sum(_read(c for c in counters if device in (None, c.device.type)))


def _skipped(members: Iterable[StepItem]) -> list[int]:
    return _read([item.state["skipped"] for item in members])


def _read(counters: Iterable[Tensor]) -> list[int]:
    """Return the values of 0-d tensors, with one wait for each device."""
    counters = list(counters)
    values = [0] * len(counters)
    for device in {counter.device for counter in counters}:
        places = [i for i, counter in enumerate(counters) if counter.device == device]
        for i, value in zip(
            places, torch.stack([counters[i] for i in places]).tolist(), strict=True
        ):
            values[i] = value
    return values


class Call(NamedTuple):
    """Parameters of one kind on one device, and the arguments of an operator for them, by name.

    ``operator`` is that of a whole step: ``factored_step_`` or ``unfactored_step_``.
    """

    operator: Any
    items: Sequence[StepItem]
    arguments: dict[str, Any]
    scalars: dict[str, Any]
    by_reference: bool


def calls_of(group: Group, members: Sequence[StepItem]) -> Iterator[Call]:
    """Yield one call per kind of parameter and device."""
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
        arguments = {
            "params": [item.param for item in items],
            "grads": [item.grad for item in items],
            **buffers,
            "param_index": [item.stream for item in items],
        }
        options = {**group, "optim_bits": bits}
        yield Call(
            schema.factored_step_ if factored else schema.unfactored_step_,
            items,
            arguments,
            dict(scalars),
            libraries.needs_reference(options, device.type),
        )


def _call_operators(group: Group, squares: dict[int, Tensor], members: Sequence[StepItem]) -> None:
    """Make one operator call per kind of parameter and device."""
    for call in calls_of(group, members):
        operator = schema.BY_REFERENCE[call.operator] if call.by_reference else call.operator
        items = call.items
        totals = torch.empty(len(items), dtype=torch.float32, device=items[0].param.device)
        operator(
            **call.arguments,
            element_offset=[0] * len(items),
            **call.scalars,
            grad_squares=totals,
        )
        squares[items[0].position] = totals
        # A kernel writes past autograd: a graph that still needs the old values has to notice.
        torch.autograd.graph.increment_version(call.arguments["params"])


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
