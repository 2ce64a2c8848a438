"""What tests set and ask of a library that runs on the shim."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass

ORDERS = ("forward", "backward", "random")
ALL = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """How grids are run, and what device the launchers believe in.

    ``workers`` blocks run at a time. Threads of a block take turns in ``order``. ``garbage`` is the
    byte that shared memory is full of at first. Of a grid with more than ``whole`` blocks only the
    first ``head`` and the last ``tail`` are run. Kernels take up to 32 KB of
    ``large_arguments``, or else 4 KB, as with older drivers.
    """

    l2_bytes: int = 1 << 20
    workers: int = 2
    order: str = "forward"
    seed: int = 0
    garbage: int = 0xFF
    head: int = 0
    tail: int = ALL
    whole: int = 0
    large_arguments: int = 1


@dataclass(frozen=True)
class Launch:
    """One grid that was run.

    ``at_once`` is how many blocks were under way together at most, ``kernel`` the kernel's offset
    in the library.
    """

    blocks: int
    threads: int
    at_once: int
    kernel: int


class Control:
    """Settings of one loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._configure = library.came8bit_shim_configure
        self._launches = library.came8bit_shim_launches
        self._launches.restype = ctypes.c_int64
        self._launches.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def configure(self, **changes: object) -> None:
        """Have all later launches run under ``Settings(**changes)``."""
        values = asdict(Settings(**changes))  # type: ignore[arg-type]
        values["order"] = ORDERS.index(values["order"])
        numbers = (ctypes.c_int64 * len(values))(*values.values())
        if self._configure(numbers, len(values)) != 0:
            raise ValueError(f"the shim refuses {values}")

    def launches(self) -> list[Launch]:
        """Grids since the last call, the first 1000."""
        capacity = 1000
        buffer = (ctypes.c_int64 * (4 * capacity))()
        count = min(self._launches(buffer, capacity), capacity)
        return [Launch(*buffer[4 * i : 4 * i + 4]) for i in range(count)]
