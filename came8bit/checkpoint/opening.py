"""From a path to the source that can read it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from .came_pytorch import MAGIC, CamePytorchFile
from .error import CheckpointError
from .source import SavedFile, Source

_OLD_MAGIC = b"\x80\x02\x8a\n"  # as a length, that is more than a safetensors header may have


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a checkpoint, or a state dict of came-pytorch; closed when the block ends.

    Raises:
        CheckpointError: it is neither, or damaged; the message begins with ``path``.
        OSError: there is no file, or it cannot be read.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(
                f"{path} is a pipe or a device, expected a file, which can be read twice; write "
                "the contents into one"
            )
        source: Source
        try:
            first = file.read(len(MAGIC))
            if first == MAGIC:
                source = CamePytorchFile(path)
            elif first == _OLD_MAGIC:
                raise CheckpointError(
                    "a file of torch.save in its format of before version 1.6; write it anew: "
                    f"torch.save(torch.load({os.fspath(path)!r}), ...)"
                )
            else:
                source = SavedFile(path, file)
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(
                text if text.startswith(f"{path}: ") else f"{path}: {text}"
            ) from error
        try:
            yield source
        finally:
            source.close()


def _open_without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its writer, perhaps for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
