"""The 8-bit codes that ``__main__.py`` compares, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import came8bit
from came8bit.reference import quant
from came8bit.reference.rungs import RUNGS

KERNEL = "square root (kernel)"
NEAREST = "square root, no decay rule"
DYNAMIC = "bitsandbytes dynamic map"
MIN_MAX_GROUP = 2048


@dataclass(frozen=True)
class Code:
    """A way to store fp32 values in 8 bits.

    Attributes:
        name: As it stands in the tables.
        bytes_per_value: Codes and scales.
        encode: ``(x, decaying)`` to whatever ``decode`` takes; ``decaying`` marks, by True, the
            values that have had no update, and codes without such a rule ignore it.
        decode: Back to fp32 of the original shape.
        timed: Whether its time says something; not if it is put together from other parts.
    """

    name: str
    bytes_per_value: float
    encode: Callable[[Tensor, Tensor | None], Any]
    decode: Callable[[Any], Tensor]
    timed: bool = True

    def round_trip(self, x: Tensor) -> Tensor:
        """``x`` as it comes back."""
        return self.decode(self.encode(x, None))


def blockwise(name: str, map_name: str, *, rule: bool = True) -> Code:
    """Return a map of ``came8bit.reference.quant`` in its blocks of 256."""

    def encode(x: Tensor, decaying: Tensor | None) -> tuple[Tensor, Tensor]:
        return quant.quantize_blockwise(x, decaying=decaying if rule else None, code=map_name)

    def decode(packed: tuple[Tensor, Tensor]) -> Tensor:
        return quant.dequantize_blockwise(*packed, code=map_name)

    return Code(name, 1 + 4 / 256, encode, decode, timed=rule)


def coarse(bits: int) -> Code:
    """Return the rung of 4 or 2 bits; the part of the momentum that the step spends is an error."""
    rung = RUNGS[bits]

    def encode(x: Tensor, decaying: Tensor | None) -> Any:
        idle = torch.zeros_like(x, dtype=torch.bool) if decaying is None else decaying
        return *rung.encode(x, idle), x.shape

    size = (bits + 16 * rung.scales / rung.block) / 8
    return Code(f"{bits} bits", size, encode, lambda packed: rung.decode(*packed))


def small_blocks(name: str, map_name: str, size: int) -> Code:
    """Return a map of ``came8bit.reference.quant`` in blocks of ``size`` values: each a slice."""

    def cut(x: Tensor) -> Tensor:
        return pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)

    def encode(x: Tensor, decaying: Tensor | None) -> Any:
        marks = None if decaying is None else cut(decaying)
        return *quant.quantize_blockwise(cut(x), decaying=marks, code=map_name), x.shape

    def decode(packed: Any) -> Tensor:
        codes, absmax, shape = packed
        x = quant.dequantize_blockwise(codes, absmax, code=map_name)
        return x.flatten()[: shape.numel()].view(shape)

    return Code(name, 1 + 4 / size, encode, decode, timed=False)


def dynamic_map() -> Code:
    """Return the signed dynamic map of bitsandbytes, by its functions; may raise ImportError."""
    from bitsandbytes import functional

    table = functional.create_dynamic_map(signed=True)

    def encode(x: Tensor, decaying: Tensor | None) -> Any:
        return functional.quantize_blockwise(x, code=table, blocksize=256)

    return Code(
        DYNAMIC, 1 + 4 / 256, encode, lambda packed: functional.dequantize_blockwise(*packed)
    )


def min_max() -> Code:
    """Affine uint8 between the least and the largest value of each group, as SANA's CAME8Bit does.

    Groups are of 2,048 consecutive values, what its block size says. (It splits by rows: there a
    group is 2,048 rows, and the error is larger than here.)
    """

    def encode(x: Tensor, decaying: Tensor | None) -> Any:
        flat = x.flatten()
        tail = flat[-1:].expand(-flat.numel() % MIN_MAX_GROUP)
        groups = torch.cat([flat, tail]).view(-1, MIN_MAX_GROUP)
        low = groups.amin(1, keepdim=True)
        scale = (groups.amax(1, keepdim=True) - low).clamp(min=1e-38) / 255
        return ((groups - low) / scale).round().to(torch.uint8), low, scale, x.shape

    def decode(packed: Any) -> Tensor:
        codes, low, scale, shape = packed
        return (codes * scale + low).flatten()[: shape.numel()].view(shape)

    return Code(f"min-max uint8, groups of {MIN_MAX_GROUP}", 1 + 8 / MIN_MAX_GROUP, encode, decode)


def kernel() -> Code:
    """Return the compiled square-root code; its operator has no decay rule, only the step has."""
    if not came8bit.kernel_status().cpu.loaded:
        raise ImportError(came8bit.kernel_status().cpu.reason)
    return Code(
        KERNEL,
        1 + 4 / 256,
        lambda x, decaying: came8bit.quantize_blockwise(x),
        lambda packed: came8bit.dequantize_blockwise(*packed),
    )


def all_codes() -> tuple[list[Code], dict[str, str]]:
    """Return the codes to compare, and by name those that cannot run, with the reason."""
    codes = [
        blockwise("square root", "sqrt"),
        blockwise(NEAREST, "sqrt", rule=False),
        blockwise("softsign", "softsign"),
        small_blocks("softsign, blocks of 32", "softsign", 32),
        blockwise("uniform", "uniform"),
        min_max(),
        coarse(4),
        coarse(2),
    ]
    missing = {}
    try:
        codes.append(dynamic_map())
    except ImportError as error:
        missing[DYNAMIC] = f"not installed ({error})"
    return codes, missing
