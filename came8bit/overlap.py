"""Which elements share memory: within a tensor, and between tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

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
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
            continue
        if tensor.layout == torch.strided:
            begin = tensor.data_ptr()
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
