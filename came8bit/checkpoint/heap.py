"""Gives freed memory back to the system while tensors are replaced one by one.

glibc keeps freed blocks of up to 32 MiB in its heap, and a new tensor, which is aligned, does not
fit into the hole that one of the same size has left.  Replacing a state tensor by tensor would then
take as much memory again, although each old tensor is freed at once.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_EVERY = 1 << 22


def _find_trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class FreedMemory:
    """Counts what has been freed and returns it every 4 MiB; does nothing outside glibc."""

    def __init__(self) -> None:
        self._trim = _find_trim()
        self._bytes = 0

    def add(self, nbytes: int) -> None:
        """Note that ``nbytes`` have been freed."""
        self._bytes += nbytes
        if self._bytes >= _EVERY and self._trim is not None:
            self._trim(0)
            self._bytes = 0
