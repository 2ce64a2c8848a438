"""Time, memory and state of one optimizer step on a CPU, against other optimizers, as ratios.

    python -m benchmarks.cpu_step                all cases; appends to results/cpu_step.csv
    python -m benchmarks.cpu_step --quick        quick run, writes nothing
    python -m benchmarks.cpu_step --shapes 4096,gpt2 --dtypes bfloat16 --threads 1,2 --repeats 50

Absolute times on a shared machine mean little, so optimizers take turns: in every repetition each
does one step, beginning with another one each time, and a ratio is formed per repetition. The
median of those is the result; the ratio of the fastest steps stands beside it, which other load
disturbs least. Every optimizer has parameters, gradients and state of its own. The fast optimizers
run in one round, against AdamW; each slow one in a round with CAME8bit alone, with fewer
repetitions, because what it leaves in the caches and the allocator affects what follows.

Beside the time of a step stand its processor time, the bytes that it has to move by count
(``BYTES``) per nanosecond, and what a plain sum and a plain copy of the gradients take in the same
round: the bandwidth that there was.

The extra memory of a step is measured in a process of its own: the peak of the resident memory
during a step above the level before it (Linux only). State is counted from the tensors, each
storage once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import came8bit
from benchmarks.harness import (
    Params,
    append,
    load,
    moment,
    quantiles,
    ratios,
    some_of,
    state_bytes,
    turns,
)
from benchmarks.peers import ADAMW, BITSANDBYTES, FOREACH, OURS, PEERS
from benchmarks.process_memory import in_a_process
from benchmarks.state_bytes import Shape, gpt2_small, lora_7b, vit_tiny
from came8bit import environment

CASES: dict[str, list[Shape]] = {
    "1024": [(1024, 1024)],
    "4096": [(4096, 4096)],
    "25152": [(25152, 1024)],
    "gpt2": gpt2_small(),
    "lora8": lora_7b(8),
    "lora64": lora_7b(64),
    "vit": vit_tiny(),
}
LISTS = ("lora8", "lora64", "vit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results" / "cpu_step.csv"
SEED = 0
WARM_UP = 3
SECONDS = 20.0
"""Aim of a round without ``--repeats``."""

FAST = (ADAMW, FOREACH, OURS, "CAME8bit nearest", "CAME32bit", "CAME4bit", "CAME2bit")
SLOW = ("came-pytorch", BITSANDBYTES)
PLAIN = ("plain sum", "plain copy")

# Bytes of an element that a step reads and writes: how many times gradient and parameter, and of
# the state. CAME reads the gradient three times, and momentum for sweeps B and C.
BYTES = {
    ADAMW: (1, 2, 16.0),
    FOREACH: (1, 2, 16.0),
    OURS: (3, 2, 3.0),
    "CAME8bit nearest": (3, 2, 3.0),
    "CAME32bit": (3, 2, 12.0),
    "CAME4bit": (3, 2, 1.5),
    "CAME2bit": (3, 2, 0.75),
    "plain sum": (1, 0, 0.0),
    "plain copy": (2, 0, 0.0),
}


class Plain:
    """Reads or copies all gradients, in place of a step."""

    def __init__(self, name: str, params: Params) -> None:
        self.state: dict[Any, Any] = {}
        self._grads = [p.grad for p in params if p.grad is not None]
        copies = name == "plain copy"
        self._copies = [torch.empty_like(g) for g in self._grads] if copies else []

    def step(self) -> None:
        """Do it once."""
        for i, grad in enumerate(self._grads):
            if self._copies:
                self._copies[i].copy_(grad)
            else:
                grad.sum()


@dataclass
class Row:
    """One optimizer on one case, one line of the CSV. Times in ms, memory in bytes."""

    case: str
    dtype: str
    optimizer: str
    numel: int
    param_bytes: int
    state_bytes_per_param: float
    times: list[float]
    cpu_times: list[float]
    relative_to: str
    ratios: list[float]
    ratio_min: float
    extra_bytes: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_ns(self) -> float | None:
        """What the fastest step moves per nanosecond, by count; None where that is not known."""
        if self.optimizer not in BYTES:
            return None
        grads, params, state = BYTES[self.optimizer]
        state *= 0.5 if self.optimizer in (ADAMW, FOREACH) and self.dtype != "float32" else 1.0
        per_element = (grads + params) * self.param_bytes / self.numel + state
        return per_element * self.numel / min(self.times) / 1e9

    def flat(self) -> dict[str, Any]:
        """Columns of the CSV."""
        ms = {f"{name}_ms": f"{1e3 * t:.4f}" for name, t in quantiles(self.times).items()}
        ratios = {f"ratio_{name}": f"{r:.4f}" for name, r in quantiles(self.ratios).items()}
        return {
            **self.about,
            "case": self.case,
            "dtype": self.dtype,
            "optimizer": self.optimizer,
            "numel": self.numel,
            "param_bytes": self.param_bytes,
            "repeats": len(self.times),
            **ms,
            "min_ms": f"{1e3 * min(self.times):.4f}",
            "ns_per_param_p50": f"{1e9 * statistics.median(self.times) / self.numel:.4f}",
            "relative_to": self.relative_to,
            **ratios,
            "ratio_min": f"{self.ratio_min:.4f}",
            "extra_bytes": "" if self.extra_bytes is None else self.extra_bytes,
            "state_bytes_per_param": f"{self.state_bytes_per_param:.5f}",
            "cpu_p50_ms": f"{1e3 * statistics.median(self.cpu_times):.4f}",
            "bytes_per_ns": "" if self.bytes_per_ns is None else f"{self.bytes_per_ns:.2f}",
        }


def make(name: str, case: str, dtype: str) -> tuple[Any, Params]:
    """Return the optimizer with parameters and gradients of its own."""
    generator = torch.Generator().manual_seed(SEED)
    params: Params = []
    for shape in CASES[case]:
        weight = torch.randn(shape, generator=generator).mul_(0.02).to(DTYPES[dtype])
        params.append(torch.nn.Parameter(weight))
        grad = torch.randn(shape, generator=generator).mul_(0.01)
        params[-1].grad = grad.to(DTYPES[dtype])
    return Plain(name, params) if name in PLAIN else PEERS[name].make(params), params


def seconds(step: Callable[[], object]) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def run_round(names: list[str], case: str, dtype: str, repeats: int | None) -> list[Row]:
    """Let the optimizers take turns; times and ratios are relative to the first."""
    made = {name: make(name, case, dtype) for name in names}
    for optimizer, _ in made.values():
        for _ in range(WARM_UP):
            optimizer.step()
    if repeats is None:
        once = sum(seconds(optimizer.step) for optimizer, _ in made.values())
        repeats = max(5, min(200, int(SECONDS / once)))
    times: dict[str, list[float]] = {name: [] for name in names}
    cpu_times: dict[str, list[float]] = {name: [] for name in names}
    for turn in turns(names, 0.0, fewest=repeats):
        for name in turn:
            begin = time.process_time()
            times[name].append(seconds(made[name][0].step))
            cpu_times[name].append(time.process_time() - begin)
    rows = []
    for name, (optimizer, params) in made.items():
        base, own = times[names[0]], times[name]
        numel = sum(p.numel() for p in params)
        rows.append(
            Row(
                case,
                dtype,
                name,
                numel,
                sum(p.nbytes for p in params),
                state_bytes(optimizer) / numel,
                own,
                cpu_times[name],
                names[0],
                ratios(own, base),
                min(own) / min(base),
            )
        )
    return rows


# --- memory ---------------------------------------------------------------------------------------


def extra_bytes(name: str, case: str, dtype: str) -> int | None:
    """How much the second step raises the resident memory; None where the system does not say."""
    if not sys.platform.startswith("linux") or name in PLAIN:
        return None
    code = """
        from benchmarks.cpu_step import make
        optimizer, _ = make(*question)
        optimizer.step()
        answer = peak_of(optimizer.step)
    """
    found: int = in_a_process(code, [name, case, dtype])
    return found


# --- results --------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """Columns that are the same for all rows of a run."""
    versions, hardware = environment.versions(), environment.hardware()
    status = came8bit.kernel_status().cpu
    return {
        **moment(),
        "came8bit": versions["came8bit"],
        "torch": versions["torch"],
        "came-pytorch": versions["came-pytorch"] or "",
        "bitsandbytes": versions["bitsandbytes"] or "",
        "python": versions["python"],
        "cpu": hardware["cpu"],
        "cores": hardware["cores"],
        "threads": torch.get_num_threads(),
        "isa": status.isa or f"none: {status.reason}",
        "load": load(),
        "seed": SEED,
    }


def table(rows: Iterable[Row]) -> list[str]:
    """Markdown."""
    lines = [
        "| case | dtype | threads | optimizer | ms p20 / p50 / p80 | CPU ms | ns/param | bytes/ns "
        "| relative to | ratio p50 (p20–p80) | ratio of minima | extra MB | state B/param |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = " / ".join(f"{1e3 * t:.2f}" for t in quantiles(row.times).values())
        ratio = quantiles(row.ratios)
        extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}"
        moved = "" if row.bytes_per_ns is None else f"{row.bytes_per_ns:.1f}"
        lines.append(
            f"| {row.case} | {row.dtype} | {row.about['threads']} | {row.optimizer} | {ms} "
            f"| {1e3 * statistics.median(row.cpu_times):.2f} "
            f"| {1e9 * statistics.median(row.times) / row.numel:.3f} | {moved} | {row.relative_to} "
            f"| {ratio['p50']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f}) | {row.ratio_min:.2f} "
            f"| {extra} | {row.state_bytes_per_param:.3f} |"
        )
    return lines


def targets(rows: Iterable[Row]) -> list[str]:
    """Which targets hold, one line each."""
    lines = []

    def line(row: Row, what: str, got: float, sign: str, target: float, note: str = "") -> None:
        holds = got <= target if sign == "≤" else got >= target
        verdict = "holds " if holds else "MISSED"
        threads = row.about["threads"]
        lines.append(
            f"{verdict} {row.case} {row.dtype}, {threads} threads: "
            f"{what} {got:.3f} {sign} {target:g}{note}"
        )

    for row in rows:
        ratio = statistics.median(row.ratios)
        minima = f" (of minima {row.ratio_min:.3f})"
        if row.optimizer in (OURS, "CAME8bit nearest") and row.relative_to == ADAMW:
            line(row, f"{row.optimizer} / {ADAMW}", ratio, "≤", 1.0, minima)
            if row.case == "gpt2":
                line(row, f"{row.optimizer} / {ADAMW}, stretch", ratio, "≤", 0.7, minima)
                line(
                    row, f"{row.optimizer} state bytes/param", row.state_bytes_per_param, "≤", 1.037
                )
            if row.extra_bytes is not None:
                allowed = 0.01 * row.param_bytes / 1e6 + 8
                line(row, f"{row.optimizer} extra MB", row.extra_bytes / 1e6, "≤", allowed)
        if row.relative_to == OURS:
            wanted = 10.0 if row.optimizer == "came-pytorch" else 20.0
            line(row, f"{row.optimizer} / {OURS}", ratio, "≥", wanted, minima)
    return lines


# --- command line ---------------------------------------------------------------------------------


def rounds(case: str, dtype: str, slow: bool, slow_gpt2: bool) -> list[list[str]]:
    """Who takes turns with whom."""

    def usable(names: Iterable[str]) -> list[str]:
        why = {name: PEERS[name].missing() for name in names}
        for name in filter(why.get, names):
            print(f"{name} is skipped: {why[name]}", file=sys.stderr)
        return [name for name, text in why.items() if not text]

    # What is rounded to the nearest is in fp32 the same as what is not.
    fast = [name for name in FAST if dtype != "float32" or name != "CAME8bit nearest"]
    if case not in LISTS:
        fast.remove(FOREACH)
    rounds = [[*usable(fast), *PLAIN]]
    if slow and case not in LISTS and (case != "gpt2" or slow_gpt2):
        rounds += [[OURS, name] for name in usable(SLOW)]
    return rounds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, known in (("--shapes", CASES), ("--dtypes", DTYPES)):
        parser.add_argument(name, type=some_of(known), help=f"of {', '.join(known)}")
    parser.add_argument("--repeats", type=int, help="repetitions of a round (default: about 20 s)")
    parser.add_argument("--slow-repeats", type=int, help="of a round with a slow optimizer")
    parser.add_argument("--slow-gpt2", action="store_true", help="slow optimizers on gpt2, too")
    parser.add_argument("--no-slow", action="store_true", help="no slow optimizers")
    parser.add_argument(
        "--threads",
        type=lambda text: [int(number) for number in text.split(",")],
        help="of PyTorch, one or several numbers (default: its own choice, then 1)",
    )
    parser.add_argument("--quick", action="store_true", help="1024 only, few repetitions, no CSV")
    parser.add_argument("--csv", type=Path, help=f"append here (default: {RESULTS.name})")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (["1024"] if options.quick else list(CASES))
    options.dtypes = options.dtypes or list(DTYPES)
    options.threads = options.threads or list(dict.fromkeys((torch.get_num_threads(), 1)))
    if options.quick:
        options.repeats = options.repeats or 20
        options.slow_repeats = options.slow_repeats or 5
    elif options.csv is None:
        options.csv = RESULTS
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    if not came8bit.kernel_status().cpu.loaded:
        raise SystemExit(f"the kernels are not loaded: {came8bit.kernel_status().cpu.reason}")
    everything: list[Row] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        everything += measure(options, about())
    print("\n".join(["", *table(everything), "", *targets(everything)]))


def measure(options: argparse.Namespace, common: dict[str, Any]) -> list[Row]:
    """Run all rounds with one number of threads; the slow ones where it is the first."""
    print(", ".join(f"{name} {value}" for name, value in common.items() if value != ""))
    if common["load"] and float(common["load"]) > 0.5:
        print("other processes are running; their time slices disturb this", file=sys.stderr)
    slow_too = not options.no_slow and common["threads"] == options.threads[0]
    everything: list[Row] = []
    for case in options.shapes:
        for dtype in options.dtypes:
            for names in rounds(case, dtype, slow_too, options.slow_gpt2):
                print(f"{case} {dtype}: {', '.join(names)} ...", file=sys.stderr, flush=True)
                slow = names[-1] in SLOW
                repeats = options.slow_repeats if slow else options.repeats
                rows = run_round(names, case, dtype, repeats)
                for row in rows[1:] if slow else rows:
                    row.about = common
                    row.extra_bytes = extra_bytes(row.optimizer, case, dtype)
                    everything.append(row)
                    if options.csv:
                        append([row.flat()], options.csv)
    return everything


if __name__ == "__main__":
    main()
