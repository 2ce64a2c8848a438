"""``came8bit info``, ``inspect`` and ``convert``: this installation, and what a checkpoint has."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import came8bit

from .. import environment
from ..errors import CliError, printable

_COLUMNS = ("", "name", "shape", "dtype", "group", "step", "skipped", "momentum", "view", "bytes")


def add_parser(subparsers: Any) -> None:
    """Declare the subcommands."""
    parser = subparsers.add_parser(
        "info",
        help="versions, which kernels are loaded and, if not, why",
        description="Show versions, hardware, and which kernels are loaded and, if not, why.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=info)
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether its checksums are correct",
        description="Show what is in a checkpoint of came8bit, or in a state dict of came8bit or "
        "came-pytorch that torch.save wrote, and compare its checksums. Exit code 1: they are "
        "wrong.",
    )
    parser.add_argument("file", metavar="FILE", help="the checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--no-verify", action="store_true", help="read the header only, not the tensors"
    )
    parser.set_defaults(run=inspect)
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
    parser.set_defaults(run=convert)


def info(args: argparse.Namespace) -> int:
    """Print what is known. Always succeeds: an absent kernel is an answer, not an error."""
    facts = {
        "versions": environment.versions(),
        "git": environment.git_revision(),
        "kernels": environment.kernels(),
        "reference_only": came8bit.kernel_status().reference_only,
        "hardware": environment.hardware(),
    }
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def describe(facts: dict[str, Any]) -> str:
    """Lay the facts out for reading; see :func:`info` for the keys."""
    versions, hardware = facts["versions"], facts["hardware"]
    rows: list[tuple[str, str]] = [
        ("came8bit", (versions["came8bit"] or "unknown version") + _in_brackets(facts["git"])),
        ("Python", versions["python"]),
        ("torch", versions["torch"] + f" (built for {_cuda(versions['cuda'])})"),
    ]
    for library, kernel in facts["kernels"].items():
        rows.extend(_kernel_rows(library, kernel, needed=library == "cpu" or versions["cuda"]))
    rows.append(("reference only", ", ".join(facts["reference_only"]) or "nothing"))
    rows.append(("processor", f"{hardware['cpu']}, {hardware['cores']} cores"))
    memory = hardware["memory"]
    rows.append(("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"))
    if hardware["gpus"]:
        for gpu in hardware["gpus"]:
            rows.append(("GPU", f"{gpu['name']}, {gpu['memory'] / 2**30:.1f} GiB"))
    else:
        rows.append(("GPU", "none that torch can use"))
    for name in environment.PACKAGES:
        if name != "torch":
            rows.append((name, versions[name] or "not installed"))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _kernel_rows(library: str, kernel: dict[str, Any], needed: bool) -> list[tuple[str, str]]:
    """Describe a library; ``needed`` where torch has tensors for it."""
    name = f"{library.upper()} kernels"
    if kernel["loaded"]:
        return [(name, f"loaded, {kernel['isa']}"), ("", kernel["path"])]
    if not needed:
        return [(name, f"not needed: {kernel['reason']}")]
    rows = [
        (name, f"NOT loaded: {kernel['reason']}"),
        ("", "the reference runs instead: same numbers, slower"),
    ]
    return [*rows, ("", f"to get them, {kernel['cure']}")] if kernel["cure"] else rows


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""


def _cuda(version: str | None) -> str:
    return f"CUDA {version}" if version else "CPU only"


def inspect(args: argparse.Namespace) -> int:
    """Print what the file holds; 1 if a tensor is damaged."""
    try:
        facts = came8bit.inspect_checkpoint(args.file, verify=not args.no_verify)
    except (ValueError, OSError) as error:
        raise CliError.of(error) from error
    print(json.dumps(facts, indent=2, allow_nan=False) if args.json else _content(facts))
    return 1 if facts["damage"] else 0


def _content(facts: dict[str, Any]) -> str:
    """Lay the facts out for reading; see :func:`came8bit.inspect_checkpoint` for the keys."""
    kinds = {
        "came8bit": f"checkpoint, format {facts['format_version']}, "
        f"written by came8bit {facts['came8bit_version']}",
        "state_dict": "state dict of came8bit",
        "came-pytorch": "state dict of came-pytorch",
    }
    verified = "correct" if facts["verified"] else "not compared"
    rows = [
        ("file", facts["path"]),
        ("kind", kinds[facts["kind"]]),
        ("bytes", f"{facts['bytes']:,}, {facts['state_bytes']:,} of them state"),
        ("checksums", f"WRONG: {facts['damage']}" if facts["damage"] else verified),
    ]
    rows += [(f"unusable {name}", fault) for name, fault in facts["faults"].items()]
    rows += [(f"metadata {key}", value) for key, value in facts["metadata"].items()]
    for index, group in enumerate(facts["groups"]):
        rows.append((f"group {index}", f"{group['parameters']} parameters"))
        rows += [(f"  {key}", str(value)) for key, value in group["options"].items()]
    rows = [(printable(name, 200), printable(value, 2000)) for name, value in rows]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    return "\n".join([*lines, "", *_table(facts["parameters"])])


def _table(parameters: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    rows += [
        (
            str(one["position"]),
            printable(one["name"] or "-", 200),
            _times(one["shape"]),
            one["dtype"] or "?",
            str(one["group"]),
            *(
                ("no state", "", "", "")
                if one["step"] is None
                else (
                    str(one["step"]),
                    str(one["skipped"]),
                    f"{one['momentum_bits'] or '?'} bits",
                    _times(one["view"]) if one["factored"] is not False else "unfactored",
                )
            ),
            f"{one['bytes']:,}",
        )
        for one in parameters
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _times(sizes: list[int] | None) -> str:
    if sizes is None:
        return "?"
    return "×".join(map(str, sizes)) or "scalar"


def convert(args: argparse.Namespace) -> int:
    """Convert, and say what has become of it."""
    if os.path.exists(args.target) and not args.force:
        raise CliError(f"{args.target} exists; name another file, or --force to replace it")
    try:
        report = came8bit.convert_checkpoint(args.source, args.target, optim_bits=args.optim_bits)
    except (ValueError, OSError) as error:
        raise CliError.of(error) from error
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
