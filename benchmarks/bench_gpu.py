"""Time, memory and bandwidth of one optimizer step on a GPU, against other optimizers.

    python benchmarks/bench_gpu.py                       all cases; writes benchmarks/results/gpu.*
    python benchmarks/bench_gpu.py --cases gpt2 --dtypes bfloat16 --seconds 20
    python benchmarks/bench_gpu.py --device cpu          no figures: tries every path, tiny

The optimizers of a round take turns step by step, each beginning as often as any other, and ratios
are formed per repetition; their median counts. Times are of CUDA events around ``step()``. All
optimizers share parameters and gradients, and own their states; before each step half a gigabyte is
written, so that what one leaves in the cache helps nobody. Bandwidths are of counted bytes
(``bench_gpu_cases.py``), and a large device-to-device copy in the same run is the ceiling.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_cpu import quantiles
from bench_gpu_cases import (
    CASES,
    TINY,
    adamw8bit_bytes,
    cached_bytes,
    largest_swept,
    streamed_bytes,
)
from bench_gpu_measure import (
    Device,
    by_sweep,
    kernel_times,
    make_params,
    param_bytes,
    state_bytes,
)
from bench_gpu_peers import OPTIMIZERS, OURS, Params, missing, remark
from bench_gpu_targets import judge

import came8bit
from came8bit.cli import environment

DTYPES = ("bfloat16", "float32")
RESULTS = Path(__file__).parent / "results"
GROUP_VARIABLE = "CAME8BIT_CUDA_GROUP_BYTES"
WARM_UP = 3


@dataclass
class Run:
    """What a run has found so far."""

    device: Device
    deadline: float
    copy: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        """Note something that was not measured."""
        print(f"not run: {what}: {why}", flush=True)
        self.not_run.append({"what": what, "why": why})


@dataclass
class Case:
    """A parameter list of one dtype, shared by all optimizers."""

    name: str
    dtype: str
    params: Params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        return [tuple(p.shape) for p in self.params]


def make(run: Run, case: Case, names: list[str]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers after their first steps; those that fail are noted and left out."""
    made = {}
    for name in names:
        try:
            optimizer = OPTIMIZERS[name].make(case.params)
            for _ in range(WARM_UP):
                run.device.seconds(optimizer.step)
            made[name] = optimizer
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            run.skip(f"{case.name} {case.dtype} {name}", text)
    return made


def run_round(run: Run, case: Case, names: list[str], seconds: float) -> None:
    """Let the optimizers take turns for ``seconds``, and add a row for each."""
    made = make(run, case, names)
    if OURS not in made:
        return
    names = list(made)
    times: dict[str, list[float]] = {name: [] for name in names}
    hosts: dict[str, list[float]] = {name: [] for name in names}
    begin, repetition = time.monotonic(), 0
    while repetition < 5 or (time.monotonic() - begin < seconds and repetition < 200):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            on_device, on_host = run.device.seconds(made[name].step)
            times[name].append(on_device)
            hosts[name].append(on_host)
        repetition += 1
    known = {(row["case"], row["dtype"], row["optimizer"]) for row in run.rows}
    for name in names:
        if (case.name, case.dtype, name) not in known:
            run.rows.append(row_of(run, case, name, made[name], times, hosts))
            print(line_of(run.rows[-1]), flush=True)


def row_of(
    run: Run,
    case: Case,
    name: str,
    optimizer: torch.optim.Optimizer,
    times: dict[str, list[float]],
    hosts: dict[str, list[float]],
) -> dict[str, Any]:
    """One optimizer on one case."""
    shapes, own = case.shapes, times[name]
    numel = sum(p.numel() for p in case.params)
    p50 = quantiles(own)["p50"]
    ratios = quantiles([a / b for a, b in zip(own, times[OURS], strict=True)])
    row = {
        "case": case.name,
        "dtype": case.dtype,
        "optimizer": name,
        "tensors": len(shapes),
        "numel": numel,
        "param_bytes": param_bytes(shapes, case.dtype),
        "largest_swept_bytes": largest_swept(shapes, case.dtype),
        "repeats": len(own),
        **{f"{q}_ms": 1e3 * t for q, t in quantiles(own).items()},
        "host_p50_ms": 1e3 * quantiles(hosts[name])["p50"],
        "ms_per_1e9": 1e12 * p50 / numel,
        **{f"time_over_ours_{q}": r for q, r in ratios.items()},
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
    elif name == "bitsandbytes AdamW8bit":
        row["of_copy"] = row["adamw8bit_bytes"] / p50 / run.copy["bytes_per_second"]
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row for reading."""
    of_copy = "" if row["of_copy"] is None else f", {100 * row['of_copy']:.0f} % of copy bandwidth"
    extra = "" if row["extra_bytes"] is None else f", +{row['extra_bytes'] / 1e6:.1f} MB"
    note = f" ({row['remark']})" if row["remark"] else ""
    return (
        f"{row['case']:<16}{row['dtype']:<9} {row['optimizer']:<23}"
        f"{row['p20_ms']:9.3f} /{row['p50_ms']:9.3f} /{row['p80_ms']:9.3f} ms"
        f"{row['time_over_ours_p50']:8.2f} x ours{of_copy}{extra}{note}"
    )


def run_sweeps(run: Run, case: Case) -> None:
    """Kernels of one step of ours, by sweep."""
    optimizer = OPTIMIZERS[OURS].make(case.params)
    for _ in range(WARM_UP):
        run.device.seconds(optimizer.step)
    found = by_sweep(kernel_times(optimizer.step), case.shapes, case.dtype)
    for sweep in found:
        flat = sweep.flat(run.copy["bytes_per_second"])
        run.sweeps.append({"case": case.name, "dtype": case.dtype, **flat})
        print(f"    {flat}", flush=True)


def run_groups(run: Run, case: Case, seconds: float) -> None:
    """Time of ours against the bytes of gradient and codes that are swept together."""
    before = os.environ.get(GROUP_VARIABLE)
    sizes = [int(run.device.l2_bytes * part) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 2)]
    optimizer = OPTIMIZERS[OURS].make(case.params)
    times: dict[str, list[float]] = {str(size): [] for size in [*sizes, 1 << 60]}
    try:
        begin, repetition = time.monotonic(), 0
        while repetition < WARM_UP + 5 or (time.monotonic() - begin < seconds and repetition < 50):
            for size, own in times.items():
                os.environ[GROUP_VARIABLE] = size
                own.append(run.device.seconds(optimizer.step)[0])
            repetition += 1
    finally:
        os.environ.pop(GROUP_VARIABLE)
        if before is not None:
            os.environ[GROUP_VARIABLE] = before
    for size, own in times.items():
        p50 = 1e3 * quantiles(own[WARM_UP:])["p50"]
        run.groups.append(
            {"case": case.name, "dtype": case.dtype, "group_bytes": int(size), "p50_ms": p50}
        )
        print(f"    {GROUP_VARIABLE}={size}: {p50:.3f} ms", flush=True)


def run_case(run: Run, case: Case, seconds: float, extras: bool) -> None:
    """All rounds of a case."""
    usable = []
    for name, entry in OPTIMIZERS.items():
        if entry.cases and case.name not in entry.cases:
            continue
        why = missing(name)
        if not why:
            usable.append(name)
        elif not any(item["what"] == name for item in run.not_run):
            run.skip(name, why)
    rounds = [[name for name in usable if not OPTIMIZERS[name].slow]]
    rounds += [[OURS, name] for name in usable if OPTIMIZERS[name].slow]
    for names in rounds:
        if run.left() < seconds:
            run.skip(f"{case.name} {case.dtype}: {', '.join(names)}", "out of time")
            continue
        run_round(run, case, names, seconds / len(rounds))
    if not extras:
        return
    if not run.device.is_cuda:
        run.skip(f"{case.name} {case.dtype}: sweeps", "no GPU")
    elif not came8bit.kernel_status().cuda.loaded:
        run.skip(f"{case.name} {case.dtype}: sweeps", "no CUDA kernels")
    elif run.left() > seconds:
        run_sweeps(run, case)
    if run.left() > seconds:
        run_groups(run, case, seconds / 2)


def about(device: Device) -> dict[str, Any]:
    """What the figures belong to."""
    status = came8bit.kernel_status().cuda
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": environment.git_revision() or os.environ.get("CAME8BIT_GIT", ""),
        "device": "cpu: plumbing only, the figures mean nothing",
        "kernels": status.isa or f"none: {status.reason}",
        "versions": environment.versions(),
    }
    for package in ("adafactor8bit", "torchao"):
        facts["versions"][package] = environment.package_version(package)
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["memory"] = properties.total_memory
        facts["l2_bytes"] = device.l2_bytes
        facts["capability"] = f"{properties.major}.{properties.minor}"
    return facts


def write(result: dict[str, Any], folder: Path) -> None:
    """Write gpu.json, and append the rows to gpu.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    facts = result["about"]
    common = {k: facts[k] for k in ("date", "git", "device", "kernels")}
    common |= {"torch": facts["versions"]["torch"], "copy": result["copy"]["bytes_per_second"]}
    lines = [{**common, **row} for row in result["rows"]]
    path = folder / "gpu.csv"
    header = path.read_text(encoding="utf-8").split("\n")[0] if path.exists() else ""
    if not lines:
        return
    if header and header != ",".join(lines[0]):
        raise SystemExit(f"{path} has other columns than this version writes; move it away first")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if not header:
            writer.writeheader()
        for line in lines:
            rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
            writer.writerow(rounded)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    several: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}", **several)
    parser.add_argument("--dtypes", help=f"of {', '.join(DTYPES)}", **several)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything, about")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.csv")
    options = parser.parse_args(arguments)
    known = CASES if options.device == "cuda" else TINY
    options.cases = options.cases or list(known)
    options.dtypes = options.dtypes or list(DTYPES)
    for name, names in (("cases", known), ("dtypes", DTYPES)):
        unknown = [x for x in getattr(options, name) if x not in names]
        if unknown:
            parser.error(f"--{name}: got {', '.join(unknown)}, expected some of {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu tries the plumbing without one")
    options.shapes = {name: known[name] for name in options.cases}
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    begin = time.monotonic()
    device = Device(options.device)
    run = Run(device, begin + options.seconds, device.copy_bandwidth())
    facts = about(device)
    print(json.dumps(facts))
    print(f"copy: {run.copy['bytes_per_second'] / 1e9:.0f} GB/s read and written", flush=True)
    turns = [(dtype, name) for dtype in options.dtypes for name in options.cases]
    for number, (dtype, name) in enumerate(turns):
        share = max(0.5, run.left() / (len(turns) - number) / 3)
        if run.left() < share:
            run.skip(f"{name} {dtype}", "out of time")
            continue
        params = make_params(options.shapes[name], dtype, options.device)
        extras = name in ("llama-1b", "8192x8192", "tiny")
        run_case(run, Case(name, dtype, params), share, extras)
        del params
        gc.collect()
        device.empty_cache()
    result = {
        "about": facts,
        "copy": run.copy,
        "copy_at_the_end": device.copy_bandwidth(),
        "rows": run.rows,
        "sweeps": run.sweeps,
        "group_bytes": run.groups,
        "not_run": run.not_run,
        "seconds": time.monotonic() - begin,
    }
    result["targets"] = judge(result)
    write(result, options.out)
    for target in result["targets"]:
        print(target["text"])
    print(f"{options.out / 'gpu.json'}, after {result['seconds']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
