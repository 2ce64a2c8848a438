"""``came8bit info``: versions, hardware, and which kernels are in use."""

from __future__ import annotations

import argparse
import json
from typing import Any

import came8bit

from .. import environment


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="versions, which kernels are loaded and, if not, why",
        description="Show versions, hardware, and which kernels are loaded and, if not, why.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
    """Lay the facts out for reading; see :func:`run` for the keys."""
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
