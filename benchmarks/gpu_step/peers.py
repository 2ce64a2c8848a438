"""The optimizers of the GPU benchmark, and what has to be true for them to count."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import came8bit

Params = list[torch.nn.Parameter]

LR = 1e-5
DECAY = 0.01


def _ours(params: Params) -> torch.optim.Optimizer:
    return came8bit.CAME8bit(params, lr=LR, weight_decay=DECAY)


def _ours_32(params: Params) -> torch.optim.Optimizer:
    return came8bit.CAME32bit(params, lr=LR, weight_decay=DECAY)


def _adamw(params: Params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)


def _bitsandbytes(params: Params) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=LR, weight_decay=DECAY)


def _came_pytorch(params: Params) -> torch.optim.Optimizer:
    from came_pytorch import CAME

    return CAME(params, lr=LR, weight_decay=DECAY)


def _adafactor8bit(params: Params) -> torch.optim.Optimizer:
    """Its CAME path; the values are those of its own preset."""
    from adafactor8bit import Adafactor8Bit

    return Adafactor8Bit(
        params,
        lr=LR,
        weight_decay=DECAY,
        beta1=0.9,
        beta2=0.999,
        beta2_decay=None,
        beta3=0.9999,
        factored=True,
        relative_step=False,
        scale_parameter=False,
        scale_weight_decay=False,
        d=1.0,
    )


def _torchao(params: Params) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=LR, weight_decay=DECAY)


@dataclass(frozen=True)
class Entry:
    """An optimizer: how it is made, the module it comes from, how it is measured."""

    make: Callable[[Params], torch.optim.Optimizer]
    module: str = "torch"
    main: bool = False
    """Measured on all cases, in turns with the others of this kind; the rest with CAME8bit alone,
    on some cases, when all else is measured."""
    cases: tuple[str, ...] = ()
    """The only ones it runs; empty for all."""


OURS = "CAME8bit"
BITSANDBYTES = "bitsandbytes AdamW8bit"
OPTIMIZERS = {
    OURS: Entry(_ours, main=True),
    "AdamW(fused)": Entry(_adamw, main=True),
    BITSANDBYTES: Entry(_bitsandbytes, "bitsandbytes", main=True),
    "CAME32bit": Entry(_ours_32),
    "came-pytorch": Entry(_came_pytorch, "came_pytorch"),
    "adafactor8bit CAME": Entry(_adafactor8bit, "adafactor8bit"),
    # It compiles its step anew for each shape, within the first step, where no clock can stop it:
    # so it gets one, and comes last.
    "torchao AdamW8bit": Entry(_torchao, "torchao", cases=("8192x8192", "tiny-matrix")),
}


def _nothing(tensor: torch.Tensor) -> None:
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


def missing(name: str) -> str:
    """Return why an optimizer cannot be measured, or ''."""
    module = OPTIMIZERS[name].module
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return ""


def remark(name: str, device: str) -> str:
    """Return what a reader has to know about a figure of ``name``, after its first step; or ''."""
    if device == "cuda" and name.startswith("CAME"):
        status = came8bit.kernel_status().cuda
        return "" if status.loaded else f"reference, no kernels: {status.reason}"
    if device == "cuda" and name == "adafactor8bit CAME":
        optimizer = importlib.import_module("adafactor8bit.optimizer")
        return "" if getattr(optimizer, "_CUDA_AVAILABLE", False) else "without its CUDA kernels"
    return ""
