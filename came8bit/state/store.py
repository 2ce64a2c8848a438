"""State that lives as ordinary tensors beside its parameter: made, and taken from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Buffer, Layout


class Saved(NamedTuple):
    """The saved state of one parameter, checked: its buffers are those of ``layout``."""

    param: Tensor
    layout: Layout
    state: Mapping[str, Any]


def allocate(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """New buffers of ``layout`` on ``device``, contiguous, with their initial values."""
    return {
        buffer.name: torch.full(buffer.shape, buffer.initial, dtype=buffer.dtype, device=device)
        for buffer in layout.buffers
    }


def fit(saved: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout:
    """The first of ``layouts`` that the saved state of one parameter has.

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
    """New contiguous buffers of ``layout`` on ``device`` with the values of ``saved``.

    Every dtype is kept; no memory is shared with ``saved``, which fits ``layout`` or has more.
    """
    return {buffer.name: _copy(saved[buffer.name], buffer, device) for buffer in layout.buffers}


def _complaint(saved: Mapping[str, Any], layout: Layout) -> str | None:
    """What is wrong with ``saved``, or ``None``."""
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
    source = torch.as_tensor(value, dtype=buffer.dtype).detach()
    return torch.empty(buffer.shape, dtype=buffer.dtype, device=device).copy_(source)
