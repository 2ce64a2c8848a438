"""How the optimizers of the GPU benchmark are measured, and what has to be true for it to count."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import came8bit
from benchmarks.peers import ADAMW, BITSANDBYTES, OURS, PEERS

MAIN = (OURS, ADAMW, BITSANDBYTES)
"""Measured on all cases, in turns; the others with CAME8bit alone, on some, when all else is."""
OTHERS = (
    *("CAME4bit", "CAME2bit", "CAME32bit"),
    *("came-pytorch", "adafactor8bit CAME", "torchao AdamW8bit"),
)
"""torchao compiles its step anew for each shape, within the first step, where no clock can stop it:
so it comes last."""
ONLY_ON = {"torchao AdamW8bit": ("8192x8192", "tiny-matrix")}
"""And gets one case."""
OPTIMIZERS = {name: PEERS[name] for name in (*MAIN, *OTHERS)}


def _nothing(tensor: object) -> None:
    """Instead of waiting for the device of ``tensor``."""


@contextlib.contextmanager
def unhindered(name: str) -> Iterator[None]:
    """Within it an optimizer queues its kernels without waiting for them, if it can.

    bitsandbytes waits after each parameter, which its results do not need. Kernels can be timed
    alone only if it does not; plain times are of the optimizer as it is.
    """
    if name != BITSANDBYTES:
        yield
        return
    module = importlib.import_module("bitsandbytes.optim.optimizer")
    before = module.sync_gpu
    module.sync_gpu = _nothing
    try:
        yield
    finally:
        module.sync_gpu = before


def remark(name: str, device: str) -> str:
    """Return what a reader has to know about a figure of ``name``, after its first step; or ''."""
    if device == "cuda" and name.startswith("CAME"):
        status = came8bit.kernel_status().cuda
        return "" if status.loaded else f"reference, no kernels: {status.reason}"
    if device == "cuda" and name == "adafactor8bit CAME":
        optimizer = importlib.import_module("adafactor8bit.optimizer")
        return "" if getattr(optimizer, "_CUDA_AVAILABLE", False) else "without its CUDA kernels"
    return ""
