"""What a step of CAME8bit consists of, and what the variables of the environment change.

The library reads the variables at every step, so they are set in this process. Each setting is
timed twice, with the host's part hidden and as a CUDA graph, which has none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import came8bit
from benchmarks.gpu_step.cases import ALONE
from benchmarks.gpu_step.measure import Step, by_name, by_sweep, kernel_times, make_params
from benchmarks.gpu_step.peers import OPTIMIZERS
from benchmarks.gpu_step.run import Case, Run
from benchmarks.harness import quantiles, turns
from benchmarks.peers import BITSANDBYTES, OURS

GROUP = "CAME8BIT_CUDA_GROUP_BYTES"
SMALL = "CAME8BIT_CUDA_SMALL_ELEMENTS"
ROUNDS = "CAME8BIT_CUDA_APPLY_ROUNDS"
WARM_UP = 2
OF_A_SCAN = 1.0
"""Seconds of repetitions."""
OF_PROFILES = 12.0
"""Seconds that scans leave to what comes after them."""
NAMED = 12
"""Kernels of a step that are told by name."""

# The layers of GPT-2 fit half of the cache, each of them and some together; those of Llama do not.
PROFILED = ("llama-7b-layers", "gpt2-layers", "8192x8192", "lora-7b", "128256x4096")


@dataclass(frozen=True)
class Scan:
    """Values of a variable that are tried on one case; "" leaves the choice to the library."""

    variable: str
    case: str
    values: tuple[str, ...] = ()
    of_l2: tuple[float, ...] = ()
    """Or shares of the second-level cache."""

    def settings(self, l2_bytes: int) -> list[str]:
        """All values."""
        return ["", *self.values, *(str(int(share * l2_bytes)) for share in self.of_l2)]


SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 2)
WITHOUT = str(1 << 60)
SCANS = (
    Scan(GROUP, "llama-7b-layers", (WITHOUT,), SHARES),
    Scan(GROUP, "gpt2-layers", (WITHOUT,), SHARES),
    Scan(ROUNDS, "llama-7b-layers", ("8", "16", "32")),
    Scan(SMALL, "lora-7b", ("0", "4096", "16384", "65536")),
)
TINY_SCANS = (Scan(GROUP, "tiny", (WITHOUT,), (1 / 2,)), Scan(SMALL, "tiny", ("0",)))


@contextlib.contextmanager
def environment(variable: str, value: str) -> Iterator[None]:
    """Within it the variable has this value, also for the library, which asks ``getenv``."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def is_known(variable: str, library: str | None) -> bool:
    """Whether a library asks for the variable: scanning another one would measure noise."""
    return library is not None and variable.encode() in Path(library).read_bytes()


def run_scan(run: Run, scan: Scan, case: Case, seconds: float) -> None:
    """Time of ours with each value, in turns."""
    optimizer = OPTIMIZERS[OURS].make(case.params)
    for _ in range(WARM_UP):
        optimizer.step()
    values = scan.settings(run.device.l2_bytes)
    pauses: dict[str, float] = {}
    graphs: dict[str, Step] = {}
    for value in values:
        with environment(scan.variable, value):
            optimizer.step()
            # A step that waits would be a mistake; then the times have the host in them.
            pauses[value] = run.device.pause_for(optimizer.step) or 0.0
            if run.device.is_cuda:
                with run.guard(f"{scan.variable}={value} {case.name}: graph", ours=True):
                    graphs[value] = run.device.captured(optimizer.step)
    times: dict[str, list[float]] = {value: [] for value in values}
    graph_times: dict[str, list[float]] = {value: [] for value in values}
    for turn in turns(values, seconds, most=40):
        for value in turn:
            with environment(scan.variable, value):
                times[value].append(run.device.covered(optimizer.step, pauses[value])[0])
            if value in graphs:
                graph_times[value].append(run.device.plain(graphs[value])[0])
    for value in values:
        row: dict[str, Any] = {"piece": run.piece, "variable": scan.variable, "value": value}
        row |= {"case": case.name, "dtype": case.dtype, "repeats": len(times[value])}
        row |= {f"{q}_ms": round(1e3 * t, 4) for q, t in quantiles(times[value]).items()}
        own = graph_times[value]
        row["graph_p50_ms"] = round(1e3 * quantiles(own)["p50"], 4) if own else None
        run.scans.append(row)
        shown = "" if row["graph_p50_ms"] is None else f", as a graph {row['graph_p50_ms']:.4f}"
        name = f"{scan.variable}={value or 'default'}"
        print(f"    {case.name:<16} {name:<52} {row['p50_ms']:.4f} ms{shown}", flush=True)


def run_profile(run: Run, case: Case, name: str) -> None:
    """Kernels of one step by name; those of ours also by sweep."""
    optimizer = OPTIMIZERS[name].make(case.params)
    for _ in range(WARM_UP):
        optimizer.step()
    kernels = kernel_times(optimizer.step)
    entry = {"piece": run.piece, "case": case.name, "dtype": case.dtype, "optimizer": name}
    total = round(1e3 * sum(seconds for _, seconds in kernels), 4)
    sweeps = by_sweep(kernels, case.shapes, case.dtype) if name == OURS else []
    flat = [sweep.flat(run.copy["bytes_per_second"]) for sweep in sweeps]
    entry |= {"ms": total, "launches": len(kernels), "sweeps": flat}
    run.sweeps.append({**entry, "kernels": by_name(kernels)[:NAMED]})
    print(f"    {case.name} {case.dtype} {name}: {total} ms in {len(kernels)} launches", flush=True)
    for line in flat:
        print(f"    {line}", flush=True)


def run_profiles(run: Run, options: argparse.Namespace) -> None:
    """Time the kernels of some cases."""
    if not run.device.is_cuda or not came8bit.kernel_status().cuda.loaded:
        run.skip("sweeps", "no CUDA kernels" if run.device.is_cuda else "no GPU")
        return
    # The sum of theirs is what ours is measured by.
    usable = [x for x in (OURS, BITSANDBYTES) if x in OPTIMIZERS and not OPTIMIZERS[x].missing()]
    for name in PROFILED:
        for dtype in options.dtypes:
            if name not in options.cases or (name in ALONE and dtype != "bfloat16"):
                continue
            if run.left() < 2:
                run.skip(f"{name} {dtype}: sweeps", "out of time")
                continue
            with run.guard(f"{name} {dtype}: sweeps", ours=True):
                case = Case(name, dtype, make_params(options.shapes[name], dtype, options.device))
                for other in usable:
                    with run.guard(f"{name} {dtype} {other}: sweeps", ours=other == OURS):
                        run_profile(run, case, other)
                del case
            run.tidy()


def run_scans(run: Run, options: argparse.Namespace) -> None:
    """All scans; the profiles after them, since what a profiler leaves behind costs the host."""
    library = came8bit.kernel_status().cuda.path
    for scan in SCANS if run.device.is_cuda else TINY_SCANS:
        what = f"{scan.variable} {scan.case}"
        if scan.case not in options.cases:
            continue
        if run.device.is_cuda and not is_known(scan.variable, library):
            run.skip(what, "the library does not ask for this variable")
        elif run.left() < OF_PROFILES:
            run.skip(what, "out of time")
        else:
            with run.guard(what, ours=True):
                params = make_params(options.shapes[scan.case], "bfloat16", options.device)
                run_scan(run, scan, Case(scan.case, "bfloat16", params), OF_A_SCAN)
                del params
            run.tidy()
    run_profiles(run, options)
