"""The warning of large parameters that are not factored or coded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from .state.layout import Group, Layout, plan

_LARGE = 1 << 20  # elements


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
