"""Time, memory and bandwidth of one optimizer step on a GPU, against other optimizers.

    python -m benchmarks.gpu_step                       everything; writes benchmarks/results/gpu.*
    python -m benchmarks.gpu_step --pieces benchmarks --cases gpt2 --dtypes bfloat16 --seconds 20
    python -m benchmarks.gpu_step --device cpu          no figures: tries every path, tiny

The pieces, in the order of their value: ``benchmarks`` (bitsandbytes and fused AdamW, all cases),
``scans`` (kernels one by one, variables of the environment), ``others`` (slower optimizers, some
cases). What is known is written after each case, so a run that is stopped or loses the device keeps
what it has; ``--add`` continues in the same files.

The optimizers of a round take turns step by step, each beginning as often as any other, and ratios
are formed per repetition; their median counts. Times are of CUDA events around ``step()``: once
with the host's part hidden, by which kernels are judged, and once plain (``measure.py``).
All optimizers share parameters and gradients, and own their states; before each step half a
gigabyte is written, so that none profits from what another left in the cache. Bandwidths are of
counted bytes (``cases.py``), and a large device-to-device copy in the same run is the ceiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step.cases import (
    ALONE,
    CASES,
    TINY,
    adamw8bit_bytes,
    cached_bytes,
    largest_swept,
    streamed_bytes,
)
from benchmarks.gpu_step.measure import Device, DeviceLost, make_params, param_bytes
from benchmarks.gpu_step.peers import MAIN, ONLY_ON, OPTIMIZERS, remark, unhindered
from benchmarks.gpu_step.run import Case, Run, start
from benchmarks.gpu_step.scans import run_scans
from benchmarks.harness import quantiles, ratios, some_of, state_bytes, turns
from benchmarks.peers import BITSANDBYTES, OURS

DTYPES = ("bfloat16", "float32")
RESULTS = Path(__file__).resolve().parents[1] / "results"
WARM_UP = 3
LONGEST_CASE, OF_OTHERS = 6.0, 1.0
"""Seconds of repetitions: at most, and of the optimizers that are not measured on all cases."""
OTHERS = ("gpt2-layers", "llama-7b-layers", "8192x8192", "gpt2", "llama-1b", *TINY)
"""Cases of the optimizers that are not measured on all."""
LOST = 3
"""Exit status when the device was lost."""


# --- rounds ---------------------------------------------------------------------------------------


@dataclass
class Times:
    """Of one optimizer in one round, in seconds."""

    pause: float | None
    """Sleep that hides the host; None: it cannot be hidden, and covered times are plain ones."""
    covered: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    hidden: int = 0
    """In how many repetitions all was queued in time."""

    def measure(self, device: Device, name: str, step: Callable[[], object]) -> None:
        """One repetition."""
        plain, host = device.plain(step)
        self.plain.append(plain)
        self.host.append(host)
        if self.pause is None:
            self.covered.append(plain)
            return
        with unhindered(name):
            seconds, hidden = device.covered(step, self.pause)
        self.covered.append(seconds)
        self.hidden += hidden


def make(run: Run, case: Case, names: list[str]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers after their first steps; those that fail are noted and left out."""
    made = {}
    for name in names:
        with run.guard(f"{case.name} {case.dtype} {name}", ours=name == OURS):
            optimizer = OPTIMIZERS[name].make(case.params)
            for _ in range(WARM_UP):
                run.device.plain(optimizer.step)
            made[name] = optimizer
    return made


def run_round(run: Run, case: Case, names: list[str], seconds: float) -> None:
    """Let the optimizers take turns for ``seconds``, and add a row for each."""
    made = make(run, case, names)
    if OURS not in made:
        return
    times = {}
    for name, optimizer in made.items():
        with unhindered(name):
            times[name] = Times(run.device.pause_for(optimizer.step))
    names = list(made)
    for turn in turns(names, seconds):
        for name in turn:
            times[name].measure(run.device, name, made[name].step)
    known = {(row["case"], row["dtype"]) for row in run.rows if row["optimizer"] == OURS}
    for name in names:
        # In the rounds of the others ours is measured again, but for their ratios only.
        if name == OURS and run.piece == "others" and (case.name, case.dtype) in known:
            continue
        run.add(row_of(run, case, name, made[name], times))
        print(line_of(run.rows[-1]), flush=True)


def row_of(
    run: Run, case: Case, name: str, optimizer: torch.optim.Optimizer, times: dict[str, Times]
) -> dict[str, Any]:
    """One optimizer on one case."""
    shapes, own, ours = case.shapes, times[name], times[OURS]
    numel = sum(p.numel() for p in case.params)
    p50 = quantiles(own.covered)["p50"]
    # Plain times are compared with plain times.
    plain = ratios(own.plain, ours.plain)
    both = own.pause is not None and ours.pause is not None
    compared = quantiles(ratios(own.covered, ours.covered) if both else plain)
    row = {
        "case": case.name,
        "dtype": case.dtype,
        "optimizer": name,
        "tensors": len(shapes),
        "numel": numel,
        "param_bytes": param_bytes(shapes, case.dtype),
        "largest_swept_bytes": largest_swept(shapes, case.dtype),
        "repeats": len(own.covered),
        "covered": own.hidden / len(own.covered),
        **{f"{q}_ms": 1e3 * t for q, t in quantiles(own.covered).items()},
        **{f"plain_{q}_ms": 1e3 * t for q, t in quantiles(own.plain).items()},
        "host_p50_ms": 1e3 * quantiles(own.host)["p50"],
        "ms_per_1e9": 1e12 * p50 / numel,
        **{f"time_over_ours_{q}": r for q, r in compared.items()},
        "plain_over_ours_p50": quantiles(plain)["p50"],
        "extra_bytes": run.device.extra_bytes(optimizer.step),
        "state_bytes_per_param": state_bytes(optimizer) / numel,
        "counted_bytes": None,
        "cached_bytes": None,
        "of_copy": None,
        "adamw8bit_bytes": adamw8bit_bytes(shapes, case.dtype),
        "remark": remark(name, run.device.name),
    }
    if name == OURS:
        row["counted_bytes"] = streamed_bytes(shapes, case.dtype)
        row["cached_bytes"] = cached_bytes(shapes, case.dtype)
        row["of_copy"] = row["counted_bytes"] / p50 / run.copy["bytes_per_second"]
    elif name == BITSANDBYTES:
        row["of_copy"] = row["adamw8bit_bytes"] / p50 / run.copy["bytes_per_second"]
    return row


def line_of(row: dict[str, Any]) -> str:
    """Return a row in human-readable form."""
    of_copy = "" if row["of_copy"] is None else f", {100 * row['of_copy']:.0f} % of copy bandwidth"
    extra = "" if row["extra_bytes"] is None else f", +{row['extra_bytes'] / 1e6:.1f} MB"
    note = "" if row["covered"] > 0.5 else " (host NOT hidden)"
    note += f" ({row['remark']})" if row["remark"] else ""
    return (
        f"{row['case']:<16}{row['dtype']:<9} {row['optimizer']:<23}"
        f"{row['p20_ms']:9.3f} /{row['p50_ms']:9.3f} /{row['p80_ms']:9.3f} ms"
        f"{row['time_over_ours_p50']:8.2f} x ours"
        f"; plain {row['plain_p50_ms']:.3f} ms, {row['plain_over_ours_p50']:.2f} x"
        f"; host {row['host_p50_ms']:.2f} ms{of_copy}{extra}{note}"
    )


# --- pieces ---------------------------------------------------------------------------------------


def usable(run: Run, main: bool) -> list[str]:
    """Optimizers of a kind that are installed; the others are noted."""
    found = []
    for name, peer in OPTIMIZERS.items():
        if (name in MAIN) != main:
            continue
        if why := peer.missing():
            run.skip(name, why)
        else:
            found.append(name)
    return found


def run_main(run: Run, options: argparse.Namespace) -> None:
    """All cases, against what is fast."""
    names = usable(run, main=True)
    turns = [
        (dtype, name)
        for dtype in options.dtypes
        for name in options.cases
        if name not in ALONE or dtype == "bfloat16"
    ]
    for number, (dtype, name) in enumerate(turns):
        share = min(LONGEST_CASE, max(0.5, run.left() / (len(turns) - number) / 3))
        if run.left() < share:
            run.skip(f"{name} {dtype}", "out of time")
            continue
        with run.guard(f"{name} {dtype}", ours=True):
            case = Case(name, dtype, make_params(options.shapes[name], dtype, options.device))
            run_round(run, case, [OURS] if name in ALONE else names, share)
            del case
        run.tidy()


def run_others(run: Run, options: argparse.Namespace) -> None:
    """One after the other, each with CAME8bit alone."""
    names = usable(run, main=False)
    cases = [name for name in OTHERS if name in options.cases]
    for name in names:
        for dtype in options.dtypes:
            for case_name in cases:
                if case_name not in ONLY_ON.get(name, cases):
                    continue
                what = f"{case_name} {dtype} {name}"
                if run.left() < 2:
                    run.skip(what, "out of time")
                    continue
                with run.guard(what):
                    params = make_params(options.shapes[case_name], dtype, options.device)
                    run_round(run, Case(case_name, dtype, params), [OURS, name], OF_OTHERS)
                    del params
                run.tidy()


PIECES: dict[str, Callable[[Run, argparse.Namespace], None]] = {
    "benchmarks": run_main,
    "scans": run_scans,
    "others": run_others,
}


# --- command line ---------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, names in (("--pieces", PIECES), ("--cases", {**CASES, **TINY}), ("--dtypes", DTYPES)):
        parser.add_argument(name, type=some_of(names), help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything, about")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.csv")
    parser.add_argument("--add", action="store_true", help="keep what gpu.json has, if it fits")
    options = parser.parse_args(arguments)
    known = CASES if options.device == "cuda" else TINY
    options.pieces = options.pieces or list(PIECES)
    options.dtypes = options.dtypes or list(DTYPES)
    options.cases = options.cases or list(known)
    if not known.keys() >= set(options.cases):
        parser.error(f"--cases: on this device, expected some of {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu tries the plumbing without one")
    options.shapes = {name: known[name] for name in options.cases}
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if something of ours failed."""
    options = parse(arguments)
    run = start(Device(options.device), options.seconds, options.out, options.add)
    print(json.dumps(run.about))
    print(f"copy: {run.copy['bytes_per_second'] / 1e9:.0f} GB/s read and written", flush=True)
    status = 0
    try:
        for piece in options.pieces:
            run.begin(piece)
            PIECES[piece](run, options)
            run.write()
    except DeviceLost as error:
        run.skip("everything that was left", f"the device is lost: {error}")
        status = LOST
    finally:  # also when it is told to end
        run.write()
    for target in run.result()["targets"]:
        print(target["text"])
    print(options.out / "gpu.json", file=sys.stderr)
    return status or int(run.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
