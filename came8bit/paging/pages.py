"""What a page is, and what keeps its bytes while the device does not have them.

A *page* is the large buffers of one parameter's state, the ones as long as the parameter itself:
momentum with its scales, and the second moment of a parameter that is not factored. Row and
column statistics and counters are not part of it.

A :class:`BackingStore` gives out *addresses*, byte ranges of a growing space that begin as zeros,
and lends them as tensors of bytes. It does not know what they contain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..state.layout import Buffer, Layout

MIN_PAGE_BYTES = 1 << 16
"""State with smaller pages stays with its parameter: moving it would cost more than it saves."""

ALIGNMENT = 256  # of every buffer within a page; what kernels and copy engines like best

_PAGED = ("exp_avg", "absmax", "scales", "exp_avg_sq")


@dataclass(frozen=True)
class PageLayout:
    """The buffers of a page and where they begin in it."""

    buffers: tuple[Buffer, ...]
    starts: tuple[int, ...]
    nbytes: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the buffers as views of ``flat``, the page's bytes."""
        return {
            buffer.name: flat[start : start + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
            for buffer, start in zip(self.buffers, self.starts, strict=True)
        }


def page_layout(layout: Layout) -> PageLayout | None:
    """Return the page that state of ``layout`` has, or ``None`` where it is too small for one."""
    buffers = tuple(buffer for buffer in layout.buffers if buffer.name in _PAGED)
    starts, end = [], 0
    for buffer in buffers:
        starts.append(end)
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return PageLayout(buffers, tuple(starts), end) if end >= MIN_PAGE_BYTES else None


def resident_buffers(layout: Layout, page: PageLayout | None) -> Layout:
    """Return ``layout`` without what its page holds."""
    if page is None:
        return layout
    rest = tuple(buffer for buffer in layout.buffers if buffer not in page.buffers)
    return replace(layout, buffers=rest)


@dataclass(eq=False)
class Page:
    """A page that has a backing store.

    Attributes:
        key: its number in schedules.
        device: of the parameter.
        address: in its backing store.
        zeroed: nothing has been written since its bytes were zeroed.
    """

    key: int
    device: torch.device
    layout: PageLayout
    address: int
    zeroed: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes, all buffers together."""
        return self.layout.nbytes


def readable(nbytes: float) -> str:
    """Return ``nbytes`` in human-readable form."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    units = ["KiB", "MiB", "GiB", "TiB"]
    while nbytes >= 1024 * 1024 and len(units) > 1:
        nbytes /= 1024
        del units[0]
    return f"{nbytes / 1024:.4g} {units[0]}"


def both_readable(first: int, second: int) -> tuple[str, str]:
    """Return two sizes in human-readable form, exact where rounding would hide how they differ."""
    if 0 < 1000 * abs(first - second) < max(first, second):
        return f"{first} bytes", f"{second} bytes"
    return readable(first), readable(second)


class BackingStore(Protocol):
    """Memory of the host, or a file, that keeps bytes."""

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Return addresses of ranges of ``sizes`` bytes, all zero; all of them or an error."""

    def release(self, address: int, nbytes: int) -> None:
        """Take back what :meth:`reserve` gave."""

    def pieces(self, address: int, nbytes: int) -> list[Tensor]:
        """Return the range as tensors of bytes, one after the other, to read and write.

        A backing store may lend its memory for as long as one of these tensors lives.
        """

    def check(self) -> None:
        """Raise an :class:`OSError` if the bytes are not there any more."""


class AddressRanges:
    """Addresses that a :class:`BackingStore` has taken back, for new ranges of the same size."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, address: int, nbytes: int) -> None:
        """Give one back."""
        self._free[nbytes].append(address)

    def take(self, sizes: Sequence[int], end: int) -> tuple[list[int], list[int], int]:
        """Return addresses for ``sizes``, which of them are reused, and the new end of space."""
        addresses, again = [], []
        free = {size: list(self._free[size]) for size in set(sizes)}
        for index, size in enumerate(sizes):
            if free[size]:
                addresses.append(free[size].pop())
                again.append(index)
            else:
                addresses.append(end)
                end += size
        return addresses, again, end

    def taken(self, sizes: Sequence[int], addresses: Sequence[int], again: Sequence[int]) -> None:
        """Note that the answer of :meth:`take` is in use now."""
        for index in again:
            self._free[sizes[index]].remove(addresses[index])


def read_pieces(pieces: Sequence[Tensor]) -> Tensor:
    """Return one tensor of bytes: the only piece itself, or a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def write_pieces(pieces: Sequence[Tensor], layout: PageLayout, state: Mapping[str, Tensor]) -> None:
    """Copy the buffers of ``layout`` from ``state`` into a page's bytes."""
    for buffer, start in zip(layout.buffers, layout.starts, strict=True):
        source = state[buffer.name].detach().contiguous().view(-1).view(torch.uint8)
        done = 0  # bytes of the page before the current piece
        for piece in pieces:
            first, last = max(start, done), min(start + buffer.nbytes, done + piece.numel())
            if first < last:
                piece[first - done : last - done].copy_(source[first - start : last - start])
            done += piece.numel()
