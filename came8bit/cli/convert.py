"""``came8bit convert``: a checkpoint with momentum in other bits, or from came-pytorch."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import came8bit

from ..errors import CliError, printable


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint with 8-bit or fp32 momentum; import came-pytorch state",
        description="Read a checkpoint of came8bit, or a state dict of came8bit or came-pytorch "
        "that torch.save wrote, and write a checkpoint whose momentum is in other bits. One "
        "parameter is in memory at a time. To 32 bits is exact, to fewer rounds.",
    )
    parser.add_argument("source", metavar="IN", help="the file to read")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--optim-bits",
        type=int,
        metavar="BITS",
        help="bits of the momentum in all groups, such as 8 or 32 (default: as they are)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what has become of it."""
    if os.path.exists(args.target) and not args.force:
        raise CliError(f"{args.target} exists; name another file, or --force to replace it")
    try:
        report = came8bit.convert_checkpoint(args.source, args.target, optim_bits=args.optim_bits)
    except (ValueError, OSError) as error:
        raise CliError(str(error)) from error
    text = (
        f"{args.source} ({report.kind}, {report.bytes_read:,} bytes) -> {args.target} "
        f"({report.bytes_written:,} bytes): {report.parameters} parameters, momentum of "
        f"{len(report.converted)} converted"
    )
    if report.errors:
        name = max(report.errors, key=lambda one: report.errors[one])
        text += f", with a relative error of at most {report.errors[name]:.2g} ({name})"
    print(printable(text))
    for name, fault in report.faults.items():
        print(printable(f"no optimizer continues the state of {name}: {fault}"), file=sys.stderr)
    return 0
