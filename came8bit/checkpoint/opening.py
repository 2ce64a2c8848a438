"""From a path to the source that can read it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .came_pytorch import MAGIC, CamePytorchFile
from .error import CheckpointError
from .source import SavedFile, Source


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a checkpoint, or a state dict of came-pytorch; closed when the block ends.

    Raises:
        CheckpointError: it is neither, or damaged; the message begins with ``path``.
        OSError: there is no file, or it cannot be read.
    """
    with open(path, "rb") as file:
        source: Source
        try:
            if file.read(len(MAGIC)) == MAGIC:
                source = CamePytorchFile(path)
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
