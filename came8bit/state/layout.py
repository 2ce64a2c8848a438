"""Which buffers the optimizer keeps for a parameter: one declarative list, nothing allocated.

Everything that needs to know about state reads it here: the optimizer when it allocates, loading
when it checks, and planning tools when they add up bytes for a model that does not exist yet.

A parameter is seen in one of three ways (``view``, three integers whose product is its size):

* *batched last two*: ``b = prod(shape[:-2])`` matrices of ``shape[-2] x shape[-1]``;
* *first against rest*: one matrix of ``shape[0] x numel/shape[0]``, which suits convolutions;
* *unfactored*: a full second moment and no confidence term, for 0-D and 1-D parameters and for
  matrices so narrow that row and column statistics would be larger.

``factored_view="smallest"`` takes the one with the fewest bytes in total. Of equal ones it takes
the first in the order above. ``"last_two"`` always takes the first, as the official code does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.quant import NAN_CODE, slice_shape
from ..reference.rungs import RUNGS, has_nan

Group = Mapping[str, Any]
"""A parameter group: its options by name, and ``params``."""

FACTORED_VIEWS = ("smallest", "last_two")
OPTIM_BITS = (32, 8, 4, 2, 0)
DEFAULT_MIN_8BIT_SIZE = 4096


@dataclass(frozen=True)
class Buffer:
    """One state tensor of one parameter; ``initial`` fills it before the first step."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The state of one parameter.

    Attributes:
        shape: of the parameter.
        view: ``(b, n, k)``; when unfactored ``(1, slices, slice_len)`` of the 8-bit code.
        factored: whether second moment and instability are kept as rows and columns.
        momentum_bits: those of the rung it is on; 32 for fp32.
        buffers: every tensor, in the order of the operators' arguments.
    """

    shape: tuple[int, ...]
    view: tuple[int, int, int]
    factored: bool
    momentum_bits: int
    buffers: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(buffer.nbytes for buffer in self.buffers)


def _factored_views(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return candidate ``(b, n, k)`` in order of preference; none below two dimensions."""
    if len(shape) < 2:
        return []
    slices, slice_len = slice_shape(shape)
    return [(math.prod(shape[:-2]), shape[-2], shape[-1]), (1, slices, slice_len)]


def _momentum(shape: tuple[int, ...], optim_bits: int) -> tuple[Buffer, ...]:
    """Return fp32 momentum, or codes and scales where asked for and smaller."""
    full = Buffer("exp_avg", shape, torch.float32)
    if optim_bits == 32:
        return (full,)
    rung = RUNGS[optim_bits]
    codes = Buffer("exp_avg", rung.codes_shape(shape), rung.code_dtype)
    scales = Buffer(rung.scales_name, rung.scales_shape(shape), rung.scale_dtype)
    return (codes, scales) if codes.nbytes + scales.nbytes < full.nbytes else (full,)


def _statistics(shape: tuple[int, ...], view: tuple[int, int, int] | None) -> tuple[Buffer, ...]:
    """Return second moment and instability factored by ``view``, or a full second moment."""
    if view is None:
        return (Buffer("exp_avg_sq", shape, torch.float32),)
    b, n, k = view
    return (
        Buffer("exp_avg_sq_row", (b, n), torch.float32),
        Buffer("exp_avg_sq_col", (b, k), torch.float32),
        Buffer("exp_avg_res_row", (b, n), torch.float32),
        Buffer("exp_avg_res_col", (b, k), torch.float32),
        Buffer("rms_ratio", (), torch.float32, initial=1),
    )


_COUNTERS = (Buffer("step", (), torch.int64), Buffer("skipped", (), torch.int64))
COUNTERS = tuple(buffer.name for buffer in _COUNTERS)
"""Names of the buffers that are whole numbers and no tensors of a file."""


def plan(
    shape: Iterable[int],
    *,
    optim_bits: int = 8,
    min_8bit_size: int = DEFAULT_MIN_8BIT_SIZE,
    factored_view: str = "smallest",
    quantize_vectors: bool = False,
) -> Layout:
    """Return the state of a parameter of ``shape``, without allocating it.

    Args:
        shape: of the parameter.
        optim_bits: one of :data:`OPTIM_BITS`, bits of the momentum.
        min_8bit_size: parameters with fewer elements keep fp32 momentum.
        factored_view: one of :data:`FACTORED_VIEWS`.
        quantize_vectors: whether those with fewer than two dimensions may have codes.

    Raises:
        ValueError: an option has a value that does not exist.
    """
    shape = tuple(int(size) for size in shape)
    if optim_bits not in OPTIM_BITS:
        raise ValueError(f"got optim_bits {optim_bits!r}, expected one of {OPTIM_BITS}")
    if factored_view not in FACTORED_VIEWS:
        raise ValueError(f"got factored_view {factored_view!r}, expected one of {FACTORED_VIEWS}")
    candidates: list[tuple[int, int, int] | None] = [*_factored_views(shape)]
    if factored_view == "last_two" and candidates:
        candidates = candidates[:1]
    else:
        candidates.append(None)
    # min() keeps the first of equals, which is the rule for ties.
    statistics = {view: _statistics(shape, view) for view in candidates}
    view = min(candidates, key=lambda v: sum(buffer.nbytes for buffer in statistics[v]))
    may_be_coded = math.prod(shape) >= min_8bit_size and (len(shape) > 1 or quantize_vectors)
    momentum = _momentum(shape, optim_bits if may_be_coded else 32)
    return Layout(
        shape=shape,
        view=view or (1, *slice_shape(shape)),
        factored=view is not None,
        momentum_bits=optim_bits if len(momentum) == 2 else 32,
        buffers=(*momentum, *statistics[view], *_COUNTERS),
    )


def plan_state(param: Tensor, group: Group) -> Layout:
    """Return the layout that ``param`` gets under the options of ``group``."""
    return plan(
        param.shape,
        optim_bits=group["optim_bits"],
        min_8bit_size=group["min_8bit_size"],
        factored_view=group["factored_view"],
        quantize_vectors=group["quantize_vectors"],
    )


def possible_layouts(shape: Iterable[int]) -> list[Layout]:
    """Return every layout that some setting of the options gives a parameter of ``shape``."""
    shape = tuple(shape)
    found: list[Layout] = []
    for factored_view in FACTORED_VIEWS:
        for optim_bits in OPTIM_BITS:
            layout = plan(
                shape,
                optim_bits=optim_bits,
                min_8bit_size=0,
                factored_view=factored_view,
                quantize_vectors=True,
            )
            if layout not in found:
                found.append(layout)
    return found


def state_bytes(shapes: Iterable[Iterable[int]], **options: Any) -> int:
    """Return the bytes of state for parameters of ``shapes``; options as in :func:`plan`."""
    return sum(plan(shape, **options).nbytes for shape in shapes)


_LARGE = 1 << 20  # elements of parameters that are worth a warning


def warn_of_large_vectors(layouts: Sequence[tuple[str, Layout]], group: Group) -> None:
    """Warn once of parameters that take much more than matrices do, and can do with less.

    Args:
        layouts: of the parameters of ``group``, with what to call each.
        group: its options.
    """
    bits, found = group["optim_bits"], []
    for what, layout in layouts:
        if math.prod(layout.shape) < _LARGE:
            continue
        uncoded = layout.momentum_bits != bits and math.prod(layout.shape) >= group["min_8bit_size"]
        if uncoded or not (layout.factored or group["quantize_vectors"]):
            found.append((what, layout))
    if not found:
        return
    what, layout = found[0]
    numel = math.prod(layout.shape)
    if len(layout.shape) == 1:
        kind = "a vector, as FSDP1 and DeepSpeed ZeRO make of matrices"
        other = plan(layout.shape, optim_bits=min(bits, 8), min_8bit_size=0, quantize_vectors=True)
        do = "Shard with torch's ZeroRedundancyOptimizer, or "
        do += "set quantize_vectors=True" if bits < 32 else "use CAME8bit(quantize_vectors=True)"
    else:
        kind = "hardly more than a vector"
        rows = next(rows for rows in range(math.isqrt(numel), 0, -1) if numel % rows == 0)
        other = plan((rows, numel // rows), optim_bits=bits, min_8bit_size=0)
        do = f"Make it a parameter of shape {other.shape}, and view it where it is used,"
    more = f" (and {len(found) - 1} more)" if found[1:] else ""
    warnings.warn(
        f"{what} is {kind}{more}: nothing in it is factored"
        + (" or coded" if layout.momentum_bits == 32 else "")
        + f", and its state takes {layout.nbytes / numel:.2f} bytes per element. "
        f"{do} for {other.nbytes / numel:.2f} bytes",
        UserWarning,
        stacklevel=4,
    )


# With 2**40 elements of this size their squares, or the statistics of 2**40 rows, still add up to a
# finite fp32 number. Momentum is a mean of clipped u, so real ones are far below.
_LARGEST = dict.fromkeys(("exp_avg", "absmax", "scales"), 2.0**43)
_LARGEST |= dict.fromkeys(("exp_avg_sq_row", "exp_avg_res_row", "exp_avg_res_col"), 2.0**86)


def find_fault(state: Mapping[str, Any]) -> str | None:
    """Say what makes a state one that no step can go on from, or return ``None``.

    Statistics are means of squares and scales are magnitudes: finite and not negative. Momentum
    is finite. None is so large that the sums of a step overflow.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or not value.numel() or name in COUNTERS:
            continue
        if value.dtype == torch.int8:
            if bool((value == NAN_CODE).any()):
                return f"{name} has codes of NaN"
        elif value.dtype == torch.uint8:
            if has_nan(value, state.get("scales")):
                return f"{name} has codes of NaN"
        elif value.is_floating_point():
            low, high = (float(bound) for bound in torch.aminmax(value.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"{name} has " + ("NaN" if math.isnan(low) else "infinite values")
            if low < 0 and name != "exp_avg":
                return f"{name} has negative values"
            if max(-low, high) > _LARGEST.get(name, math.inf):
                return f"{name} has values of {max(-low, high):.3g}, with which a step overflows"
            if name == "exp_avg" and _is_codes(value, max(-low, high)):
                return (
                    f"{name} has codes of 8 bits in place of numbers (a distributed checkpoint has "
                    "to be loaded with the optim_bits that it was saved with)"
                )
    return None


def _is_codes(value: Tensor, largest: float) -> bool:
    """Return whether fp32 momentum is 8-bit codes that were copied into it as whole numbers.

    ``torch.distributed.checkpoint`` copies into whatever the optimizer has, and every block of
    codes has one of 127.
    """
    return largest == 127.0 and torch.equal(value, value.round())
