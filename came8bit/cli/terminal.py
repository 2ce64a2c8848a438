"""Where commands print what is meant for a terminal."""

from __future__ import annotations

from typing import Any


def terminal(**options: Any) -> Any:
    """Return a ``rich`` console that leaves a closed pipe to :func:`came8bit.cli.main`.

    Args:
        options: of ``rich.console.Console``.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError that is being handled

    return Terminal(**options)
