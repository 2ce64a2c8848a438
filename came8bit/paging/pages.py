"""What a page is, and what keeps its bytes while the device does not have them.

A *page* is the large buffers of one parameter's state, the ones as long as the parameter itself:
momentum with its scales, and the second moment of a parameter that is not factored. Row and
column statistics and counters are not part of it.

A :class:`BackingStore` gives out *addresses*, byte ranges of a growing space that begin as zeros,
and lends them as tensors of bytes. It does not know what they contain.
"""

from __future__ import annotations

import bisect
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..state.layout import Buffer, Layout

MIN_PAGE_BYTES = 1 << 16
"""State with smaller pages stays with its parameter: moving it would cost more than it saves."""

ALIGNMENT = 256  # of every buffer within a page; what kernels and copy engines like best

PAGED = ("exp_avg", "absmax", "scales", "exp_avg_sq")


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
    buffers = tuple(buffer for buffer in layout.buffers if buffer.name in PAGED)
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


SLAB = 64 << 20


def pinned(nbytes: int) -> Tensor:
    """Allocate zeroed bytes of pinned memory."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)


def pinned_staging(nbytes: int) -> Tensor:
    """Allocate pinned memory between a device and a file.

    Raises:
        MemoryError: the system refuses to pin so much.
    """
    try:
        return pinned(nbytes)
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"paged state: wanted {readable(nbytes)} of pinned host memory, as much as page_budget "
            f"is, to pass pages through, had none ({str(error).splitlines()[0]}). Lower "
            "page_budget="
        ) from error


def _available_memory() -> int | None:
    """Return the bytes of host memory that could still be used, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PinnedMemory:
    """Page-locked host memory, which a device copies from and to on its own.

    It is taken in slabs, because PyTorch rounds each request up to a power of two; a range may
    cross from one slab into the next.

    Args:
        allocate: gives so many zero bytes; the default pins them.
        slab: bytes of a slab, a power of two.
    """

    def __init__(self, allocate: Callable[[int], Tensor] = pinned, slab: int = SLAB) -> None:
        self._allocate = allocate
        self._slab = slab
        self._slabs: list[Tensor] = []
        self._starts: list[int] = []
        self._size = 0  # of all slabs
        self._end = 0
        self._ranges = AddressRanges()

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """As :meth:`BackingStore.reserve`.

        Raises:
            MemoryError: the system refuses to pin so much.
        """
        addresses, again, end = self._ranges.take(sizes, self._end)
        slabs, size = [], self._size
        while size < end:
            nbytes = min(self._slab, 1 << (end - size - 1).bit_length())
            slabs.append(self._one_slab(nbytes, end - self._size, size - self._size))
            size += nbytes
        for slab in slabs:
            self._starts.append(self._size)
            self._slabs.append(slab)
            self._size += slab.numel()
        self._end = end
        self._ranges.taken(sizes, addresses, again)
        for index in again:
            for piece in self.pieces(addresses[index], sizes[index]):
                piece.zero_()
        return addresses

    def _one_slab(self, nbytes: int, wanted: int, had: int) -> Tensor:
        available = _available_memory()
        reason: object = "more than is available"
        cause = None
        if available is None or nbytes <= available:
            try:
                return self._allocate(nbytes)
            except (RuntimeError, MemoryError) as error:
                reason, cause = str(error).split("\n")[0], error
        raise MemoryError(
            f"paged state: wanted {readable(wanted)} of pinned host memory, had {readable(had)} of "
            f"it when {readable(nbytes)} more were refused ({reason}; "
            f"{'unknown' if available is None else readable(available)} of host memory available "
            "then). Give page_dir= a directory on a fast disk: pages are then kept in a file"
        ) from cause

    def release(self, address: int, nbytes: int) -> None:
        """As :meth:`BackingStore.release`; the memory stays pinned for later ranges."""
        self._ranges.add(address, nbytes)

    def pieces(self, address: int, nbytes: int) -> list[Tensor]:
        """As :meth:`BackingStore.pieces`; views of the slabs."""
        found = []
        index = bisect.bisect_right(self._starts, address) - 1
        while nbytes:
            start = address - self._starts[index]
            piece = self._slabs[index][start : start + nbytes]
            found.append(piece)
            address, nbytes, index = address + piece.numel(), nbytes - piece.numel(), index + 1
        return found

    def check(self) -> None:
        """Do nothing: memory does not vanish."""


_CPU_WINDOW = 64 << 20
_DEVICE_RING = 256 << 20


@dataclass(frozen=True)
class Placement:
    """The user's options for pages.

    Attributes:
        directory: of the page file; None: no file for CUDA, an unnamed one for the CPU.
        budget: bytes on each device that pages may take, or None for :func:`default_budget`.
    """

    directory: Path | None = None
    budget: int | None = None


def default_budget(device_type: str, sizes: Sequence[int]) -> int:
    """Return the bytes for pages of ``sizes`` by default.

    On a device 256 MiB, or three of the largest page, so that copies overlap. In CPU memory a
    sixteenth of all pages, 64 MiB at most and one page at least.
    """
    largest, total = max(sizes), sum(sizes)
    if device_type == "cpu":
        return max(largest, min(_CPU_WINDOW, total // 16))
    return min(total, max(3 * largest, _DEVICE_RING))


def check_paging(is_paged: object, page_dir: object, page_budget: object) -> Placement | None:
    """Return where pages go, or ``None`` if state is not paged; these are not options of groups.

    Raises:
        ValueError: one of the three is wrong, or has no effect.
    """
    if not isinstance(is_paged, bool):
        raise ValueError(f"got is_paged {is_paged!r}, expected True or False")
    if not is_paged:
        if page_dir is not None or page_budget is not None:
            raise ValueError(
                f"got page_dir {page_dir!r} and page_budget {page_budget!r} without is_paged=True"
            )
        return None
    directory = None
    if page_dir is not None:
        if not isinstance(page_dir, (str, os.PathLike)):
            raise ValueError(f"got page_dir {page_dir!r}, expected the path of a directory")
        directory = Path(page_dir).expanduser().absolute()
        if not (os.fspath(page_dir) and directory.is_dir()):
            raise ValueError(f"got page_dir {str(page_dir)!r}, which is not an existing directory")
    if page_budget is not None:
        if isinstance(page_budget, bool) or not isinstance(page_budget, Integral):
            raise ValueError(f"got page_budget {page_budget!r}, expected a number of bytes")
        if page_budget <= 0:
            raise ValueError(f"got page_budget {page_budget}, expected a number of bytes > 0")
        page_budget = int(page_budget)
    return Placement(directory, page_budget)
