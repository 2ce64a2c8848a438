"""Which elements share memory: within a tensor, and between tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .state.layout import Group
from .state.sharding import PLAIN
from .state.store import Work, may_train

Name = TypeVar("Name")


def elements_overlap(tensor: Tensor) -> bool:
    """Return whether two elements of ``tensor`` (strided, any device) lie in the same place."""
    if not tensor.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return stride == 0 or bool(_places(tensor).unique().numel() < tensor.numel())
            reach += stride * (size - 1)
    return False


def sharing(tensors: Iterable[tuple[Name, Tensor]]) -> tuple[Name, Name] | None:
    """Return the names of two tensors that share an element's memory, None if no two do.

    Only plain tensors with memory of their own kind are looked at: not those on the meta device,
    nor subclasses, whose memory is elsewhere.
    """
    spans = []
    for name, tensor in tensors:
        begin = tensor.data_ptr() if _has_place(tensor) and tensor.numel() else 0
        if begin:  # else there is nothing, or its memory has been freed
            end = begin + (_last_place(tensor) + 1) * tensor.itemsize
            spans.append((str(tensor.device), begin, end, name, tensor))
    spans.sort(key=lambda span: span[:3])
    open_spans: list[tuple[str, int, int, Name, Tensor]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[0] == span[0] and other[2] > span[1]]
        for other in open_spans:
            if _share(other[4], span[4], span[1] - other[1]):
                return other[3], span[3]
        open_spans.append(span)
    return None


def check_apart(work: Work, groups: Sequence[Group], places: list[int]) -> None:
    """Check that no two parameters of a step share memory that did not when it was looked at last.

    An optimizer checks that when it is made. Tools that move parameters, or give them ``data`` of
    another kind, do it later; looking at where each one begins costs a step nothing that shows.

    Args:
        work: of the step.
        groups: all of the optimizer.
        places: where each of their parameters began when all were apart, empty at first; kept up
            to date.

    Raises:
        ValueError: two parameters in ``work`` share memory, or elements of one do.
    """
    items = [item for _, members in work for item in members if type(item.param) in PLAIN]
    known = len(places) == sum(len(group["params"]) for group in groups)
    begins = [item.param.data_ptr() for item in items]
    if known and begins == [places[item.position] for item in items]:
        return
    named = [
        (f"parameter {item.position} (shape {tuple(item.param.shape)})", item.param)
        for item in items
    ]
    for name, param in named:
        if elements_overlap(param):
            raise ValueError(
                f"{name} has got strides {param.stride()}: several elements share memory, so it "
                "cannot be updated in place; use param.data = param.data.contiguous()"
            )
    params = [param for group in groups for param in group["params"]]
    apart = sharing((0, param) for param in params if may_train(param)) is None
    # Of those without a gradient two may share: weights that are swapped through one buffer.
    pair = None if apart else sharing(named)
    if pair is not None:
        raise ValueError(
            f"{pair[0]} and {pair[1]} have come to share memory, so each would undo the other's "
            "update; give one of them a copy, or train only one"
        )
    places[:] = [param.data_ptr() if _has_place(param) else 0 for param in params] if apart else []


def _has_place(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_meta


def _share(one: Tensor, other: Tensor, distance: int) -> bool:
    """Return whether two tensors share memory; ``other`` begins ``distance`` bytes later."""
    if one.itemsize != other.itemsize or distance % one.itemsize:
        return True
    return bool(torch.isin(_places(one), _places(other) + distance // one.itemsize).any())


def _last_place(tensor: Tensor) -> int:
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return sum(stride * (size - 1) for stride, size in strides)


def _places(tensor: Tensor) -> Tensor:
    """Return where the elements are, counted from the first, as an int64 vector."""
    places = torch.arange(_last_place(tensor) + 1)
    return places.as_strided(tensor.shape, tensor.stride()).reshape(-1)
