"""``came8bit estimate``: what training a model takes, and what makes it fit."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from .. import planner
from ..environment import terminal
from ..errors import CliError, printable
from ..planner import plot, report

_WIDTH = 80
_MOST = 10**15  # of sequences, tokens and elements
_LARGEST = 1e9  # of GB and GiB: bytes are counted in 64 bits
_fill = partial(textwrap.fill, width=_WIDTH, break_on_hyphens=False)
_EPILOG = f"""\
names: {", ".join(planner.CONFIGS)}

A config.json is built by transformers or diffusers (pip install 'came8bit[cli]') and run on fake
tensors. Parameters, gradients and state are exact, activations are those of the trace;
docs/planner.md says what is not counted. A GPU of 24 GB has 24 GiB, 24 * 2**30 bytes, or what it
reports: --gpu 23.6.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "estimate",
        usage="%(prog)s [options] MODEL",  # all of them would bury the error that follows it
        help="what training a model takes, and what makes it fit a GPU",
        description="Plan the memory of training a model: the cheapest setup that fits each\n"
        "GPU, and the lines of Python for it. Nothing is allocated.",
        epilog="\n\n".join(_fill(part) for part in _EPILOG.split("\n\n")),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=_WIDTH),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name from below, a config.json, a .safetensors file or .safetensors.index.json "
        "(headers only), or a folder with one of them",
    )
    add = parser.add_argument
    add("--gpu", "--card", type=_gigabytes, metavar="GB", help="the GPU's memory")
    add("--dtype", choices=list(planner.ITEMSIZE), default="bf16", help="default: bf16")
    add("--batch", type=_whole, default=1, metavar="N", help="sequences at once (default: 1)")
    add("--sequence", type=_whole, metavar="N", help="tokens in each (default: 1024, or less)")
    add("--checkpointing", action="store_true", help="activation checkpointing, layer by layer")
    add("--attention", choices=["sdpa", "eager"], help="default: the model's own")
    add("--step-in-backward", action="store_true", help="update and free gradients in backward()")
    add("--paged", action="store_true", help="only optimizers whose state is paged")
    add("--page-budget", type=_positive, metavar="MIB", help="device memory for came8bit's pages")
    add("--accumulate", action="store_true", help="gradients of several batches are added up")
    add("--fp32-embeddings", action="store_true", help="32-bit state for embeddings")
    add("--quantize-vectors", action="store_true", help="came8bit's momentum of vectors, too")
    add("--min-8bit-size", type=_whole, metavar="N", help="smaller parameters: 32-bit state")
    add("--activations", type=_positive, metavar="GIB", help="measured, in place of the trace")
    add("--reserve", type=_not_negative, default=1, metavar="GIB", help="leave free (default: 1)")
    add("--optimizers", metavar="A,B", help=f"of {', '.join(planner.OPTIMIZERS)} (default: all)")
    add("--details", action="store_true", help="every optimizer, buffer and GPU")
    add("--plot", type=Path, metavar="FILE", help="draw the picture into this PNG file")
    add("--json", action="store_true", help="print one JSON object, in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; draw it if asked to."""
    try:
        plan = _plan(args)
        if args.plot is not None:
            plot.save(plan, args.plot)
    except (ValueError, OSError) as error:
        raise CliError.of(error) from error
    if args.json:
        print(json.dumps(report.as_json(plan), indent=2, allow_nan=False))
        return 0
    _print_answer(plan)
    if args.details:
        _print_details(plan)
    else:
        print("\n--details shows every optimizer, each buffer of state and what fits where.")
    if args.plot is not None:
        print(f"The picture is in {args.plot}.")
    return 0


# --- printing -------------------------------------------------------------------------------------


def _print_answer(plan: report.Plan) -> None:
    for line in report.heading(plan):
        print(_fill(line))
    print()
    print_table(report.answer(plan))
    _print_script(plan, plan.fits[plan.chosen])


def _print_script(plan: report.Plan, fit: report.Fit) -> None:
    heading, lines = report.script(plan, fit)
    print("\n" + _fill(heading))
    if lines:
        print("\n" + textwrap.indent("\n".join(lines), "    "))


def _print_details(plan: report.Plan) -> None:
    printed = [plan.fits[plan.chosen].way]
    for fit in plan.fits:
        if fit.way not in printed:
            printed.append(fit.way)
            _print_script(plan, fit)
    source = printable(plan.model.source)
    print("\n" + _fill(f"Shapes from {source}, {len(plan.model.parameters)} tensors.") + "\n")
    parts, *others = report.details(plan)
    print_table(parts)
    print("\n" + "\n".join(report.bars(plan)))
    for table in others:
        print()
        print_table(table)


def print_table(table: report.Table) -> None:
    """Print ``table``, with rich where it is installed."""
    print(table.title)
    if importlib.util.find_spec("rich") is None:
        rows = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
        for row in rows:
            sides = "<" * table.left + ">" * len(row)
            cells = zip(row, sides, widths, strict=False)
            print("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())
    else:
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False, header_style="dim")
        for index, name in enumerate(table.header):
            drawn.add_column(Text(name), justify="left" if index < table.left else "right")
        for index, row in enumerate(table.rows):
            style = "bold green" if index == table.marked else None
            drawn.add_row(*map(Text, row), style=style)
        console = terminal(width=_WIDTH, highlight=False)
        with console.capture() as captured:
            console.print(drawn)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    if table.note:
        print(_fill(table.note))


# --- arguments ------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> report.Plan:
    model = _model(args.model)
    longest = model.workload.longest if model.workload else None
    setup = planner.Setup(
        dtype=args.dtype,
        batch=args.batch,
        sequence=args.sequence or min(1024, longest or 1024),
        checkpointing=args.checkpointing,
        release=args.step_in_backward,
        accumulation=args.accumulate,
        fp32_embeddings=args.fp32_embeddings,
        quantize_vectors=args.quantize_vectors,
        min_8bit_size=args.min_8bit_size or planner.Setup.min_8bit_size,
        budget=None if args.page_budget is None else int(args.page_budget * 2**20),
        activations=None if args.activations is None else int(args.activations * planner.GIB),
        attention=args.attention,
    )
    gpus = planner.GPUS if args.gpu is None else (args.gpu,)
    reserve = int(args.reserve * planner.GIB)
    if min(gpus) * planner.GIB <= reserve:
        raise ValueError(f"a GPU of {min(gpus):g} GB has nothing left besides --reserve")
    names = _optimizers(args.optimizers, args.paged)
    return report.make_plan(model, setup, names, gpus, reserve, paged=args.paged)


def _model(text: str) -> planner.Model:
    if text in planner.CONFIGS:
        return planner.named(text)
    path = Path(text)
    if not path.exists() and path.suffix not in (".json", ".safetensors"):
        raise ValueError(
            f"{text!r} is neither a file or folder nor a known name; names are "
            f"{', '.join(planner.CONFIGS)}"
        )
    return planner.from_path(path)


def _optimizers(text: str | None, paged: bool) -> list[str]:
    names = list(planner.OPTIMIZERS) if text is None else [n.strip() for n in text.split(",")]
    unknown = [name for name in names if name not in planner.OPTIMIZERS]
    if unknown:
        raise ValueError(
            f"--optimizers: there is no {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(planner.OPTIMIZERS)}"
        )
    chosen = [name for name in names if not paged or name.startswith("paged")]
    if not chosen:
        raise ValueError(f"--paged: none of {', '.join(names)} has paged state")
    return chosen


def _whole(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST:
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= _LARGEST:
        raise ValueError(text)
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value <= _LARGEST:
        raise ValueError(text)
    return value


def _gigabytes(text: str) -> float:
    return _positive(re.sub(r"(?i)\s*gi?b$", "", text))


# argparse names the function in its message: "invalid positive number value: '0'".
_whole.__name__, _positive.__name__ = "whole number above 0", "positive number up to 1e9"
_not_negative.__name__, _gigabytes.__name__ = "number from 0 to 1e9", "positive number of GB"
