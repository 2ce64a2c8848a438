"""The ``came8bit`` command.

Each module here declares subcommands in ``add_parser(subparsers)``, which must be cheap, and has a
function ``(args) -> int`` for each that does the work and returns the exit code. To add one, write
the module and name it in :data:`_COMMANDS`.

Exit codes: 0 done; 1 something that was asked for failed; 2 the command line or a file it names is
wrong; 130 interrupted; 141 the reader of the output has gone, as in ``came8bit ... | head``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..environment import package_version
from ..errors import CliError, printable
from . import estimate, facts, tradeoff

_COMMANDS = (facts, estimate, tradeoff)
_CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Names of files come from anywhere, too: `came8bit inspect *`.
        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="came8bit", description="CAME with 8-bit momentum for PyTorch: tools.")
    parser.add_argument(
        "--version", action="version", version=f"came8bit {package_version('came8bit')}"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: came8bit ... >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        try:
            return _run(words)
        finally:
            # Here, and not when the interpreter ends, where nothing can be caught any more.
            sys.stdout.flush()
    except OSError as error:
        # Files are named; what has no name and cannot be written is the output.
        if error.filename is not None or error.errno not in _CANNOT_WRITE:
            raise
        # What is left in the buffer has to go somewhere: the interpreter flushes it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        with contextlib.suppress(OSError):
            print(f"came8bit: error: cannot write: {error.strerror}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        print("\ncame8bit: error: expected a command", file=sys.stderr)
        return 2
    args = parser.parse_args(words)
    args.command_line = words  # reports say how to make them again
    try:
        return int(args.run(args))
    except CliError as error:
        print(f"came8bit {args.command}: error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"came8bit {args.command}: interrupted", file=sys.stderr)
        return 130
