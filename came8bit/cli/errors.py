"""The error that the command line shows as one sentence, without a traceback."""

from __future__ import annotations


class CliError(Exception):
    """Something the user can mend: a path, a name, a package that is not there.

    Attributes:
        exit_code: What the process returns.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
