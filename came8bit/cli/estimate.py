"""``came8bit estimate``: what training a model takes, and what makes it fit."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from came8bit import planner
from came8bit.cli import estimate_plot, estimate_transformers
from came8bit.errors import CliError
from came8bit.planner import report

_EPILOG = f"""\
names: {", ".join(planner.CONFIGS)}

kinds of config.json: {", ".join(planner.FAMILIES)}; others are built by transformers, if that is
installed, for their shapes.

A card of 24 GB has 24 GiB, 24 * 2**30 bytes, or what it reports: --card 23.6. Parameters, gradients
and state are exact, activations are an estimate; docs/planner.md says how good it is.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "estimate",
        help="what training a model takes, and what makes it fit a card",
        description="Plan the memory of training a model: what goes where with each optimizer, "
        "what fits which card, and the lines of Python for it. Nothing is allocated.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name from below, a config.json, a .safetensors file or .safetensors.index.json "
        "(headers only), or a folder with one of them",
    )
    add = parser.add_argument
    add("--card", type=_positive, metavar="GB", help="the card's memory (default: 8 to 48)")
    add("--dtype", choices=list(planner.ITEMSIZE), default="bf16", help="default: bf16")
    add("--batch", type=_whole, default=1, metavar="N", help="sequences at once (default: 1)")
    add("--sequence", type=_whole, metavar="N", help="tokens in each (default: 1024, or less)")
    add("--checkpointing", action="store_true", help="activation checkpointing, layer by layer")
    add("--step-in-backward", action="store_true", help="update and free gradients in backward()")
    add("--paged", action="store_true", help="only optimizers whose state is paged")
    add("--page-budget", type=_positive, metavar="MIB", help="device memory for came8bit's pages")
    add("--accumulate", action="store_true", help="gradients of several batches are added up")
    add("--fp32-embeddings", action="store_true", help="32-bit state for embeddings")
    add("--min-8bit-size", type=_whole, metavar="N", help="smaller parameters: 32-bit state")
    add("--activations", type=_positive, metavar="GIB", help="measured, in place of the estimate")
    add("--reserve", type=_not_negative, default=1, metavar="GIB", help="leave free (default: 1)")
    add("--optimizers", metavar="A,B", help=f"of {', '.join(planner.OPTIMIZERS)} (default: all)")
    add("--plot", type=Path, metavar="FILE", help="draw the picture into this PNG file")
    add("--json", action="store_true", help="print one JSON object, in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; draw it if asked to."""
    try:
        plan = _plan(args)
    except (ValueError, OSError) as error:
        raise CliError(str(error)) from error
    if args.plot is not None:
        estimate_plot.save(plan, args.plot)
    if args.json:
        print(json.dumps(report.as_json(plan), indent=2, allow_nan=False))
    else:
        print(report.as_text(plan))
        if args.plot is not None:
            print(f"\nthe picture is in {args.plot}")
    return 0


def load_model(text: str) -> planner.Model:
    """The model that the command line names.

    Raises:
        ValueError, OSError: there is none, or it cannot be read.
    """
    if text in planner.CONFIGS:
        return planner.named(text)
    path = Path(text)
    if not path.exists() and path.suffix not in (".json", ".safetensors"):
        raise ValueError(
            f"{text!r} is neither a file or folder nor a known name; names are "
            f"{', '.join(planner.CONFIGS)}"
        )
    try:
        return planner.from_path(path)
    except planner.UnknownModel as error:
        return estimate_transformers.from_config(
            path / "config.json" if path.is_dir() else path, error
        )


def _plan(args: argparse.Namespace) -> report.Plan:
    model = load_model(args.model)
    setup = planner.Setup(
        dtype=args.dtype,
        batch=args.batch,
        sequence=_sequence(args.sequence, model),
        checkpointing=args.checkpointing,
        release=args.step_in_backward,
        accumulation=args.accumulate,
        fp32_embeddings=args.fp32_embeddings,
        min_8bit_size=(
            planner.Setup.min_8bit_size if args.min_8bit_size is None else args.min_8bit_size
        ),
        budget=None if args.page_budget is None else int(args.page_budget * 2**20),
        activations=None if args.activations is None else int(args.activations * planner.GIB),
    )
    cards = planner.CARDS if args.card is None else (args.card,)
    reserve = int(args.reserve * planner.GIB)
    if min(cards) * planner.GIB <= reserve:
        raise ValueError(f"a card of {min(cards):g} GB has nothing left besides --reserve")
    return report.make_plan(
        model, setup, _optimizers(args.optimizers, args.paged), cards, reserve, paged=args.paged
    )


def _sequence(asked: int | None, model: planner.Model) -> int:
    if asked is not None:
        return asked
    longest = model.architecture.longest if model.architecture else None
    return min(1024, longest or 1024)


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
    if value < 1:
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


# argparse names the function in its message: "invalid positive number value: '0'".
_whole.__name__, _positive.__name__ = "whole number above 0", "positive number"
_not_negative.__name__ = "number of at least 0"
