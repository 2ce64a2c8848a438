"""From an optimizer to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from ..optim import CAME
from .header import Entry, dtype_name
from .names import own_names
from .writer import write_checkpoint


def save_checkpoint(
    optimizer: CAME, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> int:
    """Write options and state of ``optimizer`` to a safetensors file.

    When it returns, the file is complete and on the disk.  Until then, whatever happens, ``path``
    is what it was before.  The state is written parameter by parameter; beyond it, memory is needed
    for one parameter whose state is paged or on another device, and for next to nothing otherwise.
    The model is not in the file: save it beside.  With replicas, save on one of them.

    Args:
        optimizer: one of this package's.
        path: of the new file.  A temporary file is made in the same folder, and those that dead
            writers have left there are removed.
        metadata: strings to keep in the file, such as an epoch; loading returns them.

    Returns:
        Bytes of the file.

    Raises:
        CheckpointError: an option cannot be stored, or a state is not the optimizer's own.
        OSError: the folder is missing, the disk is full, ...; ``path`` is what it was.
    """
    check_optimizer(optimizer, "save_checkpoint")
    names = own_names(optimizer.param_groups)
    params: list[Tensor] = []
    entries: list[Entry] = []
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            name = None if names is None else names[len(params)]
            entries.append(Entry(name, index, tuple(param.shape), dtype_name(param.dtype)))
            params.append(param)
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]

    def read(position: int) -> dict[str, Tensor]:
        return optimizer._read_state(params[position])

    return write_checkpoint(path, groups, entries, read, metadata or {})


def check_optimizer(optimizer: object, function: str) -> None:
    """Raise a :class:`TypeError` for what is no optimizer of this package."""
    if isinstance(optimizer, CAME):
        return
    inner = getattr(optimizer, "optimizer", None)
    cure = "pass optimizer.optimizer, which is one" if isinstance(inner, CAME) else "pass that"
    raise TypeError(
        f"{function}: got a {type(optimizer).__name__}, expected an optimizer of came8bit; {cure}"
    )
