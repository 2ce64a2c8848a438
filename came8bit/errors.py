"""The exceptions of this package, and what an error has left behind, said at its end.

Whoever refuses something knows what is wrong, but not what else the call has done by then: the same
full disk stops a step, a part of a step in backward, or a load. So it says what is wrong and what
to do, and the outermost function, which knows, adds what has been changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

REFUSALS = (
    ValueError,
    TypeError,
    NotImplementedError,
    FloatingPointError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
)
"""What this package raises for reasons that lie outside of it, and PyTorch where memory ends."""

OUTSIDE = (OSError, MemoryError, torch.OutOfMemoryError)
"""Those that may still come when everything has been checked."""

FRESH = "Load a checkpoint, or start again with no state (optimizer.state.pop(param))"
"""What to do where the state of a parameter is the trouble."""


def explain(error: BaseException, text: str) -> None:
    """Let the message of ``error`` end with ``text``, a sentence without its full stop.

    The error stays the same object, with its traceback: one error has one message.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"{error.strerror}. {text}"
        error.args = (error.errno, error.strerror)
    else:
        error.args = (f"{str(error) or type(error).__name__}. {text}",)


@contextmanager
def explaining(note: str, kinds: tuple[type[BaseException], ...] = REFUSALS) -> Iterator[None]:
    """Append ``note`` to the message of errors of ``kinds`` that leave the block."""
    try:
        yield
    except kinds as error:
        explain(error, note)
        raise


_SHOWN = 5  # items that a message lists


def printable(text: object, limit: int | None = None) -> str:
    """Return ``text``, which came from a file, with control characters escaped for printing.

    It is on one line then, cut where it is longer than ``limit``.
    """
    text = str(text)
    cut = "" if limit is None or len(text) <= limit else "..."
    return "".join(c if c.isprintable() else _escaped(c) for c in text[:limit]) + cut


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def listed(items: Sequence[str]) -> str:
    """Return the first of ``items``, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(printable(item, 100) for item in items[:_SHOWN]) or "none") + more


class CheckpointError(ValueError):
    """A file is damaged, foreign, newer or for other parameters; the message says which."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 4000))


OTHER_WAY = (
    "Give the model's .safetensors file, its model.safetensors.index.json or the folder they are "
    "in: the shapes are read from their headers, whatever the architecture."
)


class UnknownModel(ValueError):
    """The model is not one that the planner knows; the message says which it knows.

    Attributes:
        what: the model in a few words, such as ``"a model of type 'mamba'"``.
    """

    def __init__(self, message: str, what: str = "this model") -> None:
        super().__init__(message)
        self.what = what


class CliError(Exception):
    """Something the user can mend: a path, a name, a package that is not there.

    Attributes:
        exit_code: What the process returns.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    @classmethod
    def of(cls, error: Exception) -> CliError:
        """Return one with the message of ``error``, of the system's errors without their number."""
        named = isinstance(error, OSError) and error.filename is not None and not error.filename2
        return cls(f"{error.filename}: {error.strerror}" if named else str(error))  # type: ignore[attr-defined]
