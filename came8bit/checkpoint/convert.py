"""From a file to a file, without an optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..optim import CAME
from ..options import CHOICES, FORMAT_VERSION, check_options
from ..state.layout import plan
from .error import CheckpointError
from .header import label
from .heap import FreedMemory
from .momentum import convert_momentum
from .opening import open_source
from .writer import write_checkpoint


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert_checkpoint` did.

    Attributes:
        kind: of the file that was read, ``"came8bit"`` or ``"came-pytorch"``.
        parameters: how many there are.
        converted: names of those whose momentum is in other bits now.
        bytes_read: size of the file that was read.
        bytes_written: size of the new one.
    """

    kind: str
    parameters: int
    converted: Sequence[str]
    bytes_read: int
    bytes_written: int


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    optim_bits: int | None = None,
) -> ConvertReport:
    """Write what is in ``source`` to ``target`` with momentum in other bits.

    Small parameters, vectors and those that codes would not make smaller keep fp32 momentum, as in
    an optimizer with these ``optim_bits`` and the saved ``min_8bit_size``.

    Args:
        source: a checkpoint, or a state dict of came-pytorch; the latter gets this package's
            defaults for options that came-pytorch lacks, and ``factored_view="last_two"``.
        target: of the new file; it may be ``source``.  Written like
            :func:`~came8bit.save_checkpoint` does, parameter by parameter.
        optim_bits: 8 or 32 for all groups; ``None`` leaves them as they are.

    Raises:
        CheckpointError: ``source`` is damaged, foreign or newer.  Nothing has been written.
        OSError: a file cannot be read or written.
    """
    if optim_bits is not None and optim_bits not in CHOICES["optim_bits"]:
        raise ValueError(f"got optim_bits {optim_bits!r}, expected one of {CHOICES['optim_bits']}")
    with open_source(source) as opened:
        defaults = CAME([torch.empty(0)]).defaults if opened.kind == "came-pytorch" else {}
        groups: list[dict[str, Any]] = []
        for index, saved in enumerate(opened.groups):
            group = {**defaults, **saved, "format_version": FORMAT_VERSION}
            group["optim_bits"] = optim_bits or group.get("optim_bits")
            try:
                check_options(group)
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(f"{source}: group {index}: {error}") from error
            groups.append(group)
        opened.verify()
        converted: list[str] = []
        freed = FreedMemory()

        def read(position: int) -> dict[str, Tensor]:
            entry = opened.entries[position]
            layout, group = entry.layout, groups[entry.group]
            if layout is None or entry.shape is None:
                return {}
            freed.add(4 * math.prod(entry.shape))  # what came before it
            bits = layout.momentum_bits
            if group["optim_bits"] != opened.groups[entry.group]["optim_bits"]:
                bits = plan(
                    entry.shape,
                    optim_bits=group["optim_bits"],
                    min_8bit_size=group["min_8bit_size"],
                ).momentum_bits
            if bits != layout.momentum_bits:
                converted.append(label(entry, position))
            return convert_momentum(opened.read(position), bits)

        entries = [
            replace(entry, step=None, skipped=0, sha256=None, tensors={})
            for entry in opened.entries
        ]
        written = write_checkpoint(target, groups, entries, read, opened.user)
        return ConvertReport(opened.kind, len(entries), converted, opened.nbytes, written)
