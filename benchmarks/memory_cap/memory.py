"""Caps, peaks and clocks of the capped job, on a CPU and on a GPU; and what a bus can carry."""

from __future__ import annotations

import errno
import re
import time
from typing import Any

import torch

from benchmarks.process_memory import reset_peak, status

COPY_BYTES = 512 << 20
_SHORTAGES = re.compile(
    r"out of memory|allocate memory|bad_alloc|not enough memory|raise the limit"
    # All that oneDNN says; what it does not support is "a primitive descriptor".
    r"|could not create a (memory|primitive)(?! descriptor)",
    re.IGNORECASE,
)


LATER = 256 << 20
"""Bytes left to the driver under a cap, for kernels that it loads when they are first used."""


class Refused(Exception):
    """Why something is not even tried on this machine."""


def shortage(error: BaseException) -> str | None:
    """Return the first line of an error that is due to lack of memory, else None."""
    first = (str(error).splitlines() or [""])[0]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    known = known or (isinstance(error, (RuntimeError, OSError)) and bool(_SHORTAGES.search(first)))
    return f"{type(error).__name__}: {first[:300]}" if known else None


class CpuMeter:
    """Address space and resident memory beyond what there was at :meth:`begin`.

    The cap is ``RLIMIT_AS``, which another process sets: nothing to do here.
    """

    def begin(self) -> None:
        """From now on."""
        reset_peak()
        self._size, self._resident = status("VmSize"), status("VmRSS")
        self._times: list[float] = []

    def start(self) -> None:
        """Begin a step."""
        self._begin = time.perf_counter()

    def stop(self) -> None:
        """End the step."""
        self._times.append(time.perf_counter() - self._begin)

    def seconds(self) -> list[float]:
        """Of each step."""
        return self._times

    def end(self) -> dict[str, int]:
        """Return the peaks, in bytes."""
        return {
            "peak_address_space": status("VmPeak") - self._size,
            "peak_resident": status("VmHWM") - self._resident,
        }


class CudaMeter:
    """Memory of the whole GPU: PyTorch's, and what the driver keeps for the process (context).

    The cap is for both together. PyTorch's share is enforced by
    ``set_per_process_memory_fraction``; what others hold in CUDA managed memory is not, so it is
    counted separately.

    Args:
        cap: bytes; None: the GPU's own.
    """

    def __init__(self, cap: int | None) -> None:
        self._cap = cap

    def begin(self) -> None:
        """Make the context, set the cap."""
        torch.ones(1, device="cuda").add_(1).cpu()
        torch.cuda.empty_cache()
        self.context = self._used() - torch.cuda.memory_reserved()
        if self._cap is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            share = (self._cap - self.context - LATER) / total
            if share <= 0 or self._cap > total:
                raise Refused(
                    f"a cap of {self._cap} bytes, on a GPU of {total} of which {self.context} "
                    "are in use before anything begins"
                )
            torch.cuda.set_per_process_memory_fraction(share)
        torch.cuda.reset_peak_memory_stats()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @staticmethod
    def _used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def start(self) -> None:
        """Begin a step; the host does not wait."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._events.append((begin, end))

    def stop(self) -> None:
        """End the step, as far as the host is concerned."""
        self._events[-1][1].record()

    def seconds(self) -> list[float]:
        """Of each step; waits for them."""
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._events]

    def end(self) -> dict[str, int]:
        """Return the peaks, in bytes; ``beside`` is GPU memory in use that is not PyTorch's."""
        torch.cuda.synchronize()
        beside = self._used() - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        return {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": reserved,
            "context": self.context,
            "beside": beside,
        }


def meter_for(device: torch.device, cap: int | None) -> CpuMeter | CudaMeter:
    """Return the one for ``device``."""
    return CudaMeter(cap) if device.type == "cuda" else CpuMeter()


def copy_speeds(nbytes: int = COPY_BYTES, repeats: int = 5) -> dict[str, Any]:
    """Bytes per second between pinned memory and the GPU: in, out, and both at the same time.

    ``both`` is per direction. Each is the median of ``repeats``.
    """
    host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: dict[str, Any] = {"bytes": nbytes}
    for what, ways in (("in", (0,)), ("out", (1,)), ("both", (0, 1))):
        times = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for way in ways:
                target, source = (host, card) if way else (card, host)
                with torch.cuda.stream(streams[way]):
                    target[way].copy_(source[way], non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found[what] = nbytes / sorted(times[1:])[repeats // 2]
    del host, card
    torch.cuda.empty_cache()
    return found
