"""Which state a step cannot use, and why: looked for when a step has failed, and not before.

Only something else can have put such state into ``optimizer.state``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .errors import FRESH
from .overlap import sharing
from .paging.pages import PAGED
from .state.layout import Buffer, Group, Layout, plan_state, possible_layouts
from .state.sharding import is_sharded
from .state.store import StateStore, fit
from .validation import has_memory


@contextmanager
def blaming_state(store: StateStore, groups: Sequence[Group]) -> Iterator[None]:
    """Turn an error that state of the wrong kind has caused into one that names it."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        fault = _misfit(store, groups)
        if fault is None:
            raise
        raise ValueError(f"{fault}. {FRESH}") from error


def _misfit(store: StateStore, groups: Sequence[Group]) -> str | None:
    """Say which parameter has state that is not of its shape, dtype and device, and why.

    Only what is at hand is looked at: not what is in pages elsewhere, nor what is sharded.
    """
    buffers: list[tuple[str, Tensor]] = []
    members = ((param, group) for group in groups for param in group["params"])
    for position, (param, group) in enumerate(members):
        state = store.state.get(param)
        if not state or is_sharded(param):
            continue
        what = f"the state of parameter {position} (shape {tuple(param.shape)})"
        for name, value in state.items():
            if isinstance(value, Tensor):  # else fit() says what it is
                fault = _fault_in_memory(value, param)
                if fault:
                    return f"{what} does not fit: {name} {fault}"
                buffers.append((f"{name} of parameter {position}", value))
        layouts = [plan_state(param, group), *possible_layouts(param.shape)]
        if "exp_avg" not in state:
            layouts = [replace(layout, buffers=_beside_a_page(layout)) for layout in layouts]
        try:
            fit(state, layouts)
        except ValueError as error:
            return f"{what} does not fit: {error}"
    pair = sharing(buffers)
    return pair and f"{pair[0]} and {pair[1]} share memory, so a step would change both twice"


def _beside_a_page(layout: Layout) -> tuple[Buffer, ...]:
    return tuple(buffer for buffer in layout.buffers if buffer.name not in PAGED)


def _fault_in_memory(value: Tensor, param: Tensor) -> str | None:
    """Say why a kernel cannot write to the elements of ``value`` one after another."""
    if value.device != param.device:
        return f"is on {value.device}, expected {param.device}"
    if value.layout != torch.strided:
        return f"has layout {value.layout}, expected {torch.strided}"
    if not has_memory(value):
        return "has lost its memory, which has been freed"
    if value.is_neg():
        return "is a view with the sign changed, expected an ordinary tensor"
    if not value.is_contiguous():
        return f"has strides {value.stride()}, expected a contiguous tensor"
    return None
