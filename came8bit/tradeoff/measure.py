"""Measures: bytes of optimizer state, peak memory, times."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class StateBytes:
    """Bytes held by the tensors of an optimizer's state.

    Attributes:
        total: Bytes of all storages, each counted once however many tensors look at it.
        by_dtype: The same bytes by the dtype of the first tensor seen on each storage.
        python_numbers: Plain Python numbers in the state (step counts); they occupy no tensor
            memory.
    """

    total: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)
    python_numbers: int = 0


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Count the bytes of the tensors in ``optimizer.state``.

    Whole storages are counted, not views: a state that is cut from one large buffer counts as the
    buffer, and a table that all parameters share (bitsandbytes' quantization maps) counts once.
    """
    counted = StateBytes()
    seen: set[tuple[torch.device, int]] = set()
    for leaf in _leaves(list(optimizer.state.values())):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            key = (storage.device, storage.data_ptr())
            if storage.nbytes() == 0 or key in seen:
                continue
            seen.add(key)
            dtype = str(leaf.dtype).removeprefix("torch.")
            counted.total += storage.nbytes()
            counted.by_dtype[dtype] = counted.by_dtype.get(dtype, 0) + storage.nbytes()
        else:
            counted.python_numbers += 1
    return counted


def _leaves(value: Any) -> Iterator[torch.Tensor | float]:
    """Yield the tensors and numbers in nested containers; of a wrapper tensor, the inner ones."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _leaves(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def parameter_count(model: torch.nn.Module, min_side: int = 0) -> int:
    """Return the number of trainable elements, of wide matrices only if ``min_side`` is given.

    Tied parameters count once. A wide matrix has both sides at least ``min_side``.
    """
    return sum(
        p.numel()
        for p in model.parameters()
        if p.requires_grad and (not min_side or (p.dim() >= 2 and min(p.shape) >= min_side))
    )


def wide_fraction(model: torch.nn.Module, width: int = 256) -> float:
    """Return the share of the elements that lie in matrices with both sides at least ``width``."""
    return parameter_count(model, width) / parameter_count(model)


class PeakMemory:
    """Peak memory above the level at construction, in bytes.

    On CUDA this is what torch's allocator handed out. On a CPU it is resident memory of the
    process: the kernel's high-water mark, set back at construction where the system allows it
    (Linux). It covers everything allocated from then on, so construct it after the data and before
    the model.

    Attributes:
        method: How it was measured, in words; None if this system offers no way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.method: str | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._base = torch.cuda.memory_allocated(device)
            self.method = "torch.cuda.max_memory_allocated"
            return
        reset = _reset_high_water_mark()
        base = _status_bytes("VmRSS")
        if base is not None:
            self._base = base
            self.method = "resident memory (VmHWM" + (")" if reset else ", not reset)")
            return
        highest = _max_resident()
        self._base = highest or 0
        self.method = None if highest is None else "resident memory (ru_maxrss)"

    def above_start(self) -> int | None:
        """Return the peak so far, in bytes above the start; None if it cannot be measured."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._base
        peak = _status_bytes("VmHWM")
        if peak is None:
            peak = _max_resident()
        return None if peak is None else max(0, peak - self._base)


def give_back_freed_memory() -> bool:
    """Have the C allocator return freed blocks to the system at once; True if it will (glibc).

    Otherwise the peak of resident memory includes freed blocks that the allocator keeps, many MiB
    and different from run to run. Slows allocation down, so times measured after it are not used.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return False
    return bool(mallopt(mmap_threshold, 32 * 1024)) and bool(mallopt(trim_threshold, 0))


def _reset_high_water_mark() -> bool:
    """Ask Linux to set VmHWM back to the present size (proc(5), clear_refs, value 5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _max_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


class Stopwatch:
    """Collects durations in milliseconds; waits for the GPU's queue before and after.

    The first ``skip`` measurements are dropped: state is allocated and caches are cold in them.
    """

    def __init__(self, device: torch.device, skip: int = 5) -> None:
        self._device = device
        self._skip = skip
        self._all: list[float] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time the body."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._all.append(1e3 * (time.perf_counter() - start))

    def summary(self) -> dict[str, float]:
        """Return the 20th, 50th and 80th percentile in ms; NaN if nothing was measured."""
        kept = self._all[self._skip :] or self._all or [float("nan")]
        return {f"p{q}": float(np.percentile(kept, q)) for q in (20, 50, 80)}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
