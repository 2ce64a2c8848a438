"""Where state lives: the interface of every store, and the store of ordinary tensors.

An optimizer hands :class:`StepItem` to its store and gets complete state back, wherever that is
kept; :class:`DenseStore` keeps it beside the parameters, :class:`came8bit.paging.PagedStore`
outside their device.
"""

from __future__ import annotations

import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..reference.rungs import momentum_shape
from .layout import Buffer, Group, Layout, plan_state, possible_layouts
from .sharding import allocate_sharded, copy_sharded, is_sharded, local


class Saved(NamedTuple):
    """The saved state of one parameter, checked: its buffers are those of ``layout``."""

    param: Tensor
    layout: Layout
    state: Mapping[str, Any]


@dataclass(slots=True, eq=False)  # a step makes one per parameter, and a tuple would take longer
class StepItem:
    """A parameter that has a gradient, its state, and its position in ``state_dict()``.

    ``stream`` numbers its random bits, below 2**32; see :func:`stream_of`. ``sharded`` is the
    DTensor that ``param`` is a part of.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    position: int
    stream: int = 0
    sharded: Tensor | None = None


Work = Sequence[tuple[Group, Sequence[StepItem]]]
"""What a step has to do, by group."""

Run = Callable[[Sequence[StepItem]], None]
"""Update parameters whose state is complete; keeps no reference to it."""


class StateStore(Protocol):
    """Keeps the state of an optimizer's parameters.

    Copied or pickled, a store is an empty one of the same kind: the optimizer that it belongs to
    carries the state.

    Attributes:
        state: of each parameter the tensors that are at hand without moving anything; an empty or
            missing entry has no state yet. This is what ``optimizer.state`` shows.
        takes_sharded: whether parameters may be DTensors. Their state is made of DTensors, and a
            visit hands on what is here of parameter, gradient and state.
    """

    state: defaultdict[Any, Any]
    takes_sharded: bool

    def shape_of(self, param: Tensor) -> torch.Size | None:
        """Return the shape that the state of ``param`` was made for, None if it is incomplete."""

    def drop_others(self, params: Iterable[Tensor]) -> None:
        """Free what is kept for parameters that are neither in ``params`` nor in ``state``."""

    def reserve(self, groups: Sequence[Group]) -> None:
        """Make room for the state of every parameter of ``groups`` that has none, or raise.

        Raises:
            OSError, MemoryError: there is no room; nothing has changed.
        """

    def check(self, groups: Sequence[Group]) -> None:
        """Check everything that a step over ``groups`` needs, before it begins.

        Raises:
            OSError, MemoryError, ValueError, NotImplementedError: as :meth:`prepare`.
        """

    def prepare(self, work: Work, groups: Sequence[Group]) -> None:
        """Make missing state and be ready to visit ``work``; no parameter changes.

        Args:
            work: items of one step, whose empty states are filled.
            groups: all groups of the optimizer.

        Raises:
            OSError, MemoryError, ValueError, NotImplementedError: no room, or state is lost.
        """

    def visit(self, items: Sequence[StepItem], run: Run) -> None:
        """Call ``run`` with prepared ``items`` and their complete state, in one or several lots."""

    def set_prefetch_order(self, params: Iterable[Tensor]) -> None:
        """Expect visits in this order in every step; with an empty one, in each step's own."""

    def flush(self) -> None:
        """Finish what a step has left under way."""

    def read(self, param: Tensor) -> dict[str, Tensor]:
        """Return the complete state of ``param``, empty before its first step; do not write to it.

        It is good until the next step or the next :meth:`write` of ``param``.
        """

    def write(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Replace the state of ``param`` by tensors on its device that nothing else uses."""

    def replace_all(self, saved: Iterable[Saved]) -> None:
        """Replace all state by copies of ``saved``.

        Raises:
            OSError, MemoryError: there is no room; the message says what has changed.
        """

    def adopt(self, state: Mapping[Any, Any]) -> None:
        """Replace all state by ``state``, complete, whose tensors nothing else uses."""

    def complete(self) -> AbstractContextManager[None]:
        """Let ``state`` be complete inside the block, for saving."""


class DenseStore:
    """State as ordinary tensors, or DTensors, each on the device of its parameter."""

    takes_sharded = True

    def __init__(self) -> None:
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def shape_of(self, param: Tensor) -> torch.Size | None:
        """As :meth:`StateStore.shape_of`."""
        state = self.state.get(param) or {}
        return momentum_shape(state, param.shape) if "exp_avg" in state else None

    def drop_others(self, params: Iterable[Tensor]) -> None:
        """Keep everything: state waits for its parameter to come back."""

    def reserve(self, groups: Sequence[Group]) -> None:
        """Do nothing: memory is taken when state is made."""

    def check(self, groups: Sequence[Group]) -> None:
        """Do nothing: there is nothing to lose between two steps."""

    def prepare(self, work: Work, groups: Sequence[Group]) -> None:
        """As :meth:`StateStore.prepare`."""
        fresh = fresh_items(work)
        for item, layout in fresh:
            item.state.update(allocate_for(item.param, layout))
        if follow_devices(item for _, items in work for item in items) and not self._warned:
            self._warned = True
            warnings.warn(
                "the state of a parameter that has moved to another device follows it; where "
                "parameters move at every step, use PagedCAME8bit, or is_paged=True",
                UserWarning,
                stacklevel=5,
            )
        for item, _ in fresh:
            self.state[item.param] = item.state

    def visit(self, items: Sequence[StepItem], run: Run) -> None:
        """As :meth:`StateStore.visit`: all at once."""
        run([_local_item(item) if is_sharded(item.param) else item for item in items])

    def set_prefetch_order(self, params: Iterable[Tensor]) -> None:
        """Do nothing: everything is at hand."""

    def flush(self) -> None:
        """Do nothing: nothing is under way."""

    def read(self, param: Tensor) -> dict[str, Tensor]:
        """As :meth:`StateStore.read`."""
        state: dict[str, Tensor] = self.state.get(param) or {}
        return state

    def write(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """As :meth:`StateStore.write`; of whole tensors a DTensor takes its own part."""
        if is_sharded(param) and state and not is_sharded(state["exp_avg"]):
            layout = fit(state, possible_layouts(param.shape))
            state = copy_sharded(state, layout, param)
        self.state[param] = state

    def replace_all(self, saved: Iterable[Saved]) -> None:
        """As :meth:`StateStore.replace_all`."""
        state: defaultdict[Any, Any] = defaultdict(dict)
        for param, layout, tensors in saved:
            if is_sharded(param):
                state[param] = copy_sharded(tensors, layout, param)
            else:
                state[param] = copy(tensors, layout, param.device)
        self.state = state

    def adopt(self, state: Mapping[Any, Any]) -> None:
        """As :meth:`StateStore.adopt`."""
        self.state = defaultdict(dict, state)

    def complete(self) -> AbstractContextManager[None]:
        """As :meth:`StateStore.complete`: it always is."""
        return nullcontext()


def stream_of(group: Group, position: int, first: int) -> int:
    """Return the number of the random bits of a parameter.

    It is the same whether the parameter is stepped by one optimizer, by one of many, or on one of
    several ranks: the CRC-32 of its name, if the group has names; else its position, counted from
    the group's ``stream`` if that is set.

    Args:
        group: of the parameter.
        position: of the parameter in the optimizer.
        first: of the group's first parameter.

    Raises:
        ValueError: the group has names, but not for all of its parameters.
    """
    names = group.get("param_names")
    if group["stream"] is not None:
        return (int(group["stream"]) + position - first) % 2**32
    if names and len(names) <= position - first:
        raise ValueError(
            f"got {len(names)} names in a group of more parameters; add_param_group() adds them"
        )
    return _name_stream(names[position - first]) if names else position


@lru_cache(1 << 16)
def _name_stream(name: str) -> int:
    words = name.split(".")
    if words[0] == "module":  # DistributedDataParallel
        del words[0]
    words = [word for word in words if word not in ("_orig_mod", "_fsdp_wrapped_module")]
    return zlib.crc32(".".join(words).encode())


def follow_devices(items: Iterable[StepItem]) -> bool:
    """Move state to the device of its parameter; return whether some was elsewhere."""
    moved = False
    for item in items:
        if item.state["step"].device != item.param.device and not is_sharded(item.param):
            moved = True
            for name, tensor in item.state.items():
                item.state[name] = tensor.to(item.param.device)
    return moved


def fresh_items(work: Work) -> list[tuple[StepItem, Layout]]:
    """Return the items in ``work`` that have no state, with the layout that each will get.

    Raises:
        NotImplementedError: a parameter is on the meta device.
    """
    fresh = []
    for group, items in work:
        for item in items:
            if item.state:
                continue
            if item.param.is_meta:
                raise NotImplementedError(
                    f"parameter {item.position} is a {type(item.param).__name__} on "
                    f"{item.param.device}, which has no values; use to_empty() first"
                )
            fresh.append((item, plan_state(item.param, group)))
    return fresh


def missing_layouts(
    groups: Sequence[Group], state: Mapping[Any, Any]
) -> Iterator[tuple[Tensor, Layout]]:
    """Yield the parameters that a step may reach and that have no state yet, with its layout."""
    for group in groups:
        for param in filter(may_train, group["params"]):
            if not state.get(param) and not param.is_meta and param.numel():
                yield param, plan_state(param, group)


def _local_item(item: StepItem) -> StepItem:
    """Return ``item`` with what is here of its tensors; a visit writes to them in place."""
    state = {name: local(tensor) for name, tensor in item.state.items()}
    return replace(
        item, param=local(item.param), grad=local(item.grad), state=state, sharded=item.param
    )


def may_train(param: Tensor) -> bool:
    """Return whether a step may reach ``param``."""
    return param.requires_grad or param.grad is not None


def allocate_for(param: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return new state of ``param`` with its initial values."""
    if is_sharded(param):
        return allocate_sharded(layout, param)
    return allocate(layout, param.device)


def allocate(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Return new buffers of ``layout`` on ``device``, contiguous, with their initial values."""
    return {
        buffer.name: torch.full(buffer.shape, buffer.initial, dtype=buffer.dtype, device=device)
        for buffer in layout.buffers
    }


def fit(saved: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout:
    """Return the first of ``layouts`` that the saved state of one parameter has.

    Args:
        saved: name to value; the counters may be Python integers.
        layouts: those that are accepted, the expected one first.

    Raises:
        ValueError: ``saved`` fits none of ``layouts``; the message speaks of the first.
    """
    complaints = []
    for layout in layouts:
        complaint = _complaint(saved, layout)
        if complaint is None:
            return layout
        complaints.append(complaint)
    raise ValueError(complaints[0])


def copy(saved: Mapping[str, Any], layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Return new contiguous buffers of ``layout`` on ``device`` with the values of ``saved``.

    Every dtype is kept; no memory is shared with ``saved``, which fits ``layout`` or has more.
    """
    return {buffer.name: _copy(saved[buffer.name], buffer, device) for buffer in layout.buffers}


def _complaint(saved: Mapping[str, Any], layout: Layout) -> str | None:
    """Return what is wrong with ``saved``, or ``None``."""
    if not isinstance(saved, Mapping):
        return f"got the state of a parameter as {type(saved).__name__}, expected a dict"
    expected = [buffer.name for buffer in layout.buffers]
    if set(saved) != set(expected):
        return f"got buffers {sorted(map(str, saved))}, expected {sorted(expected)}"
    for buffer in layout.buffers:
        value = saved[buffer.name]
        counter = buffer.dtype == torch.int64
        if counter and isinstance(value, int) and not isinstance(value, bool):
            value = torch.tensor(value)
        if not isinstance(value, Tensor):
            return f"{buffer.name} is a {type(value).__name__}, expected a tensor"
        if value.dtype != buffer.dtype or tuple(value.shape) != buffer.shape:
            return (
                f"got {buffer.name} of {value.dtype} and shape {tuple(value.shape)}, expected "
                f"{buffer.dtype} and shape {buffer.shape}"
            )
        if counter and not value.is_meta and value.item() < 0:
            return f"got {buffer.name} = {value.item()}, expected a count"
    return None


def _copy(value: Tensor | int, buffer: Buffer, device: torch.device) -> Tensor:
    if is_sharded(value):
        raise ValueError(
            f"got {buffer.name} as a DTensor, for a parameter that is not one; gather the state by "
            "get_optimizer_state_dict with StateDictOptions(full_state_dict=True)"
        )
    source = torch.as_tensor(value, dtype=buffer.dtype).detach()
    return torch.empty(buffer.shape, dtype=buffer.dtype, device=device).copy_(source)
