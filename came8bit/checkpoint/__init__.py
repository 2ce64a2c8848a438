"""Optimizer state in a file: written whole or not at all, read whole or not at all.

``docs/checkpoints.md`` describes the file. Everything here goes through the optimizer's
store, so it does not matter where the state lives.
"""

from ..errors import CheckpointError
from .convert import ConvertReport, convert_checkpoint, inspect_checkpoint
from .load import LoadReport, load_checkpoint
from .save import save_checkpoint

__all__ = [
    "CheckpointError",
    "ConvertReport",
    "LoadReport",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
