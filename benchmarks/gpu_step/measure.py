"""Time, memory and kernels of steps on a GPU; on a CPU the same calls, to test the plumbing.

A step is timed in two ways. *Plain*: the events stand right around the step, so that a step whose
launches take the host longer than the device has idle time in it. *Covered*: the device sleeps
first, until everything of the step is queued, which leaves the time of its kernels alone.
"""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_step.cases import ITEM, SWEEPS
from benchmarks.harness import Params
from benchmarks.state_bytes import Shape

Step = Callable[[], object]

SMALL_ELEMENTS = 1 << 16
"""Matrices up to this size are stepped by one block each (csrc/cuda/step.cu)."""

FLUSH_BYTES = 512 << 20
"""Written before each timed step, so that no case finds in the cache what another left."""

PAUSE = 2.5
"""The device sleeps that many times as long as the host needs to queue a step."""
LONGEST_PAUSE = 0.2
"""Seconds; a step that is not queued by then waits for the device, or for room in its queue."""


class DeviceLost(Exception):
    """Every further use of the device would fail in this process."""


class Device:
    """A GPU, or the CPU that stands in for one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.is_cuda else 1 << 16, dtype=torch.int8)
        self._flush = self._flush.to(name)

    @property
    def l2_bytes(self) -> int:
        """Size of the second-level cache."""
        if not self.is_cuda:
            return 1 << 20
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def empty_cache(self) -> None:
        """Give freed memory back, so that the next case finds a whole GPU."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def check(self) -> None:
        """Raise DeviceLost if an earlier error has made the device useless."""
        if not self.is_cuda:
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.name).item()
        except torch.OutOfMemoryError:
            return
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error

    # --- time -------------------------------------------------------------------------------------

    @functools.cached_property
    def _cycles_per_second(self) -> float:
        """At which the device sleeps, once its clock has risen."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000_000)
        begin.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
        return 10_000_000 / (begin.elapsed_time(end) / 1e3)

    def plain(self, step: Step) -> tuple[float, float]:
        """Time of one step with a cold cache: on the device, and until ``step`` returned."""
        if not self.is_cuda:
            begin = time.perf_counter()
            step()
            end = time.perf_counter()
            return end - begin, end - begin
        begin_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin_event.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3, host

    def covered(self, step: Step, pause: float) -> tuple[float, bool]:
        """Time the device alone: it sleeps ``pause`` seconds while the step is queued.

        Returns:
            The time, and whether all was queued before the device began.
        """
        if not self.is_cuda:
            return self.plain(step)[0], True
        begin_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(int(pause * self._cycles_per_second))
        begin_event.record()
        step()
        end_event.record()
        hidden = not begin_event.query()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3, hidden

    def pause_for(self, step: Step) -> float | None:
        """Seconds that cover the host's part of ``step``; None if nothing does."""
        pause = PAUSE * min(self.plain(step)[1] for _ in range(3)) + 1e-4
        while pause <= LONGEST_PAUSE:
            # Twice in a row: the host is not equally fast each time.
            if self.covered(step, pause)[1] and self.covered(step, pause)[1]:
                return pause
            pause *= 2
        return None

    def captured(self, step: Step) -> Step:
        """Capture the step as a CUDA graph, which costs the host one launch."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    # --- memory, bandwidth ------------------------------------------------------------------------

    def extra_bytes(self, step: Step) -> int | None:
        """Peak of the allocator during one step above the level before it."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def copy_bandwidth(self, nbytes: int | None = None, repeats: int = 20) -> dict[str, Any]:
        """Bytes read and written per second by a large copy: what any kernel can hope for."""
        nbytes = nbytes or ((2 << 30) if self.is_cuda else (1 << 20))
        source = torch.randint(0, 100, (nbytes,), dtype=torch.int8, device=self.name)
        target = torch.empty_like(source)
        for _ in range(3):
            target.copy_(source)
        times = [self.covered(lambda: target.copy_(source), 2e-4)[0] for _ in range(repeats)]
        return {
            "bytes": 2 * nbytes,
            "p50_ms": 1e3 * statistics.median(times),
            "bytes_per_second": 2 * nbytes / statistics.median(times),
        }


def make_params(shapes: list[Shape], dtype: str, device: str) -> Params:
    """Parameters with gradients; all optimizers of a case share them and own their states."""
    generator = torch.Generator(device).manual_seed(0)
    params: Params = []
    for shape in shapes:
        made = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=device).normal_(
                0.0, scale, generator=generator
            )
            for scale in (0.02, 0.01)
        ]
        params.append(torch.nn.Parameter(made[0]))
        params[-1].grad = made[1]
    return params


# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepTime:
    """The kernels of one sweep during one step."""

    sweep: str
    seconds: float
    launches: int
    bytes: int

    def flat(self, copy_bandwidth: float) -> dict[str, Any]:
        """Return a line of the report; bytes are counted, so caches can lift them above a copy."""
        rate = self.bytes / self.seconds if self.seconds else None
        return {
            "sweep": self.sweep,
            "launches": self.launches,
            "ms": round(1e3 * self.seconds, 4),
            "counted_bytes": self.bytes,
            "GB_per_s": None if rate is None else round(rate / 1e9, 1),
            "of_copy": None if rate is None else round(rate / copy_bandwidth, 3),
        }


def kernel_times(step: Step) -> list[tuple[str, float]]:
    """Names and seconds of all kernels of one step, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in trace.events()
        if str(event.device_type).endswith("CUDA")
    ]


def by_name(kernels: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return launches and milliseconds of each kernel by name, the longest first."""
    found: dict[str, list[float]] = {}
    for name, seconds in kernels:
        short = re.sub(r"\(anonymous namespace\)::|came8bit::|^void ", "", name)
        short = re.sub(r"\((\w+)\)(?=\d)", r"\1 ", short).split("(")[0]
        found.setdefault(short[:120], []).append(seconds)
    lines = [
        {"kernel": name, "launches": len(times), "ms": round(1e3 * sum(times), 4)}
        for name, times in found.items()
    ]
    return sorted(lines, key=lambda line: -float(str(line["ms"])))


def by_sweep(kernels: list[tuple[str, float]], shapes: list[Shape], dtype: str) -> list[SweepTime]:
    """Sum up kernels by sweep; what belongs to none comes last, with no bytes counted."""
    # Smaller ones take one launch for all three sweeps.
    sizes = [torch.Size(shape).numel() for shape in shapes if len(shape) > 1]
    elements = sum(size for size in sizes if size > SMALL_ELEMENTS)
    rest = list(kernels)
    found = []
    for sweep in SWEEPS:
        mine = [k for k in rest if re.search(sweep.kernels, k[0])]
        rest = [k for k in rest if k not in mine]
        counted = elements * sweep.bytes_per_element(dtype) if mine else 0
        found.append(SweepTime(sweep.name, sum(t for _, t in mine), len(mine), counted))
    found.append(SweepTime("everything else", sum(t for _, t in rest), len(rest), 0))
    return found


def param_bytes(shapes: list[Shape], dtype: str) -> int:
    """Bytes of the parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes) * ITEM[dtype]
