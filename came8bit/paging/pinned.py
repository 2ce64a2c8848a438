"""Pages in pinned host memory: the backing store of CUDA parameters."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .pages import AddressRanges, readable

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
