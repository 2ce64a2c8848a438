"""The error of files that are not a usable checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file is damaged, foreign, newer or for other parameters; the message says which."""
