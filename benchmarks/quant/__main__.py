"""Error and speed of 8-bit codes for CAME's momentum (docs/internals/quantization.md).

    python -m benchmarks.quant --data-dir data

Three models train for 100 steps on real data (the Python standard library's sources; Fashion-MNIST
where ``make data`` has put it) with fp32 momentum; every code stores their momenta. Then the same
with synthetic updates, and the time of encoding and decoding. Prints Markdown and appends a row for
every number to ``benchmarks/results/quant.csv``. One thread: the codes are compared, not the cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import append
from benchmarks.quant.codes import Code, all_codes, kernel
from benchmarks.quant.momenta import BETA1, Momenta, trainings
from came8bit import environment
from came8bit.reference.quant import BLOCK_SIZE

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quant.csv"
RECURSIVE_STEPS = 60
STOPPED_STEPS = 300


class Rows:
    """Collects ``subject, code, metric, value`` and appends them, with what they were run on."""

    def __init__(self, seed: int) -> None:
        versions, hardware = environment.versions(), environment.hardware()
        self._head = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git": environment.git_revision(),
            **{name: versions[name] for name in ("came8bit", "torch", "bitsandbytes", "python")},
            "cpu": hardware["cpu"],
            "isa": environment.kernels()["cpu"]["isa"],
            "threads": torch.get_num_threads(),
            "seed": seed,
        }
        self.values: dict[tuple[str, str, str], float] = {}
        self._rows: list[dict[str, object]] = []

    def add(
        self,
        subject: str,
        code: str,
        metric: str,
        value: float,
        p20: float | None = None,
        p80: float | None = None,
    ) -> None:
        """Remember one number, for the tables and for the file."""
        self.values[subject, code, metric] = value
        row = {"subject": subject, "code": code, "metric": metric, "value": f"{value:.6g}"}
        row["p20"], row["p80"] = ("" if p is None else f"{p:.6g}" for p in (p20, p80))
        self._rows.append({**self._head, **row})

    def append_to(self, path: Path) -> None:
        """Append all rows to the CSV at ``path``, which is made if it is not there."""
        append(self._rows, path)


# --- errors ---------------------------------------------------------------------------------------


def relative(error: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of what it is an error of."""
    return (error.double().norm() / exact.double().norm()).item()


def block_maximum(x: Tensor) -> Tensor:
    """For every value the largest magnitude of its block of 256, the same blocks for every code."""
    flat = x.abs().reshape(x.shape[0], -1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK_SIZE))
    largest = blocks.unflatten(1, (-1, BLOCK_SIZE)).amax(-1).repeat_interleave(BLOCK_SIZE, dim=1)
    return largest[:, : flat.shape[1]].view(x.shape)


def one_coding(rows: Rows, subject: str, momenta: Momenta, codes: list[Code]) -> None:
    """Relative RMS errors, mean and worst over the matrices, and what becomes of small values.

    The error is also taken in the update, where CAME's confidence weighs every value.
    """
    for code in codes:
        errors, of_update, small, kept, zeroed, total = [], [], 0.0, 0.0, 0, 0
        for name, x in momenta.final.items():
            y = code.round_trip(x)
            errors.append(relative(y - x, x))
            weights = momenta.confidence[name]
            of_update.append(relative((y - x) * weights, x * weights))
            part = x.abs() / block_maximum(x)
            chosen = (part >= 1e-3) & (part < 1e-2)
            small += x[chosen].abs().double().sum().item()
            kept += (y * x.sign())[chosen].double().sum().item()
            zeroed += int(((y == 0) & (x != 0)).sum())
            total += int((x != 0).sum())
        rows.add(subject, code.name, "error, mean", statistics.fmean(errors))
        rows.add(subject, code.name, "error, worst", max(errors))
        rows.add(subject, code.name, "of the update, mean", statistics.fmean(of_update))
        rows.add(subject, code.name, "of the update, worst", max(of_update))
        rows.add(subject, code.name, "small values kept", kept / small)
        rows.add(subject, code.name, "zeroed", zeroed / total)


def replay(code: Code, start: Tensor, updates: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the stored momentum after coding it anew at every step."""
    beta1 = torch.tensor(BETA1)
    packed = code.encode(start, None)
    for w, nothing in updates:
        packed = code.encode(code.decode(packed) * beta1 + w, nothing)
    return code.decode(packed)


def recursive(rows: Rows, subject: str, momenta: Momenta, codes: list[Code]) -> None:
    """Error of the momentum after the last steps of a real training, coded at every one of them."""
    for code in codes:
        errors = []
        for name, exact in momenta.final.items():
            stored = replay(code, momenta.history[0][name], momenta.updates(name))
            errors.append(relative(stored - exact, exact))
        rows.add(subject, code.name, "recursive error, mean", statistics.fmean(errors))


def synthetic(rows: Rows, codes: list[Code], seed: int) -> None:
    """60 steps of random updates; then a quarter of the columns stops for 300 more."""
    shape, stopped = (64, 1024), slice(0, 1024, 4)
    for subject in ("Gaussian", "heavy tail"):
        generator = torch.Generator().manual_seed(seed)
        # Magnitudes that differ from element to element: some values are always small.
        spread = torch.exp(1.5 * torch.randn(shape, generator=generator))
        scale = spread if subject == "heavy tail" else torch.ones(shape)
        updates = [
            torch.randn(shape, generator=generator) * scale * 0.1
            for _ in range(RECURSIVE_STEPS + STOPPED_STEPS)
        ]
        exact = torch.zeros(shape)
        for w in updates[:RECURSIVE_STEPS]:
            exact = exact * torch.tensor(BETA1) + w
        for w in updates[RECURSIVE_STEPS:]:
            w[:, stopped] = 0
        for code in codes:
            pairs = [(w, w == 0) for w in updates]
            stored = replay(code, torch.zeros(shape), pairs[:RECURSIVE_STEPS])
            rows.add(subject, code.name, "recursive error", relative(stored - exact, exact))
            rest = replay(code, stored, pairs[RECURSIVE_STEPS:])
            stuck = rest[:, stopped]
            size = (stuck.square().mean() / rest.square().mean()).sqrt().item()
            rows.add(subject, code.name, "stopped, not zero", (stuck != 0).double().mean().item())
            rows.add(subject, code.name, "stopped, RMS", size)


# --- speed ----------------------------------------------------------------------------------------


def speed(rows: Rows, codes: list[Code], seed: int, rounds: int = 9) -> None:
    """Time of one encoding and one decoding of 2**20 values, the codes taking turns."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[float]] = {code.name: [] for code in codes}
    for i in range(rounds + 1):
        for code in codes:
            start = time.perf_counter()
            code.round_trip(x)
            if i:  # the first round warms up
                times[code.name].append((time.perf_counter() - start) / x.numel() * 1e9)
    for name, values in times.items():
        ordered = sorted(values)
        p20, p80 = ordered[rounds // 5], ordered[-1 - rounds // 5]
        rows.add("speed", name, "ns per value", statistics.median(values), p20, p80)


# --- tables ---------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def percent(x: float) -> str:
    return f"{100 * x:.2f} %" if x < 10 else f"{x:.0e} times"


def print_errors(rows: Rows, subjects: list[str], codes: list[Code]) -> None:
    for subject in subjects:
        print(f"\n{subject}: stored once, and coded anew over {RECURSIVE_STEPS} steps\n")
        metrics = ["error, mean", "error, worst", "of the update, mean", "of the update, worst"]
        metrics += ["recursive error, mean", "zeroed"]
        lines = []
        for code in codes:
            of = {m: rows.values[subject, code.name, m] for m in [*metrics, "small values kept"]}
            cells = [percent(of[m]) for m in metrics] + [f"{of['small values kept']:.2f}"]
            lines.append([code.name, f"{code.bytes_per_value:.3f}", *cells])
        print(table(["code", "B/value", *metrics, "small values kept"], lines))


def print_synthetic(rows: Rows, codes: list[Code]) -> None:
    print(f"\nSynthetic updates: {RECURSIVE_STEPS} steps; {STOPPED_STEPS} steps after some stop\n")
    head, lines = ["code"], []
    for subject in ("Gaussian", "heavy tail"):
        head += [f"{subject}: error", "stopped, not zero", "stopped, RMS"]
    for code in codes:
        cells = [code.name]
        for subject in ("Gaussian", "heavy tail"):
            for metric in ("recursive error", "stopped, not zero", "stopped, RMS"):
                cells.append(percent(rows.values[subject, code.name, metric]))
        lines.append(cells)
    print(table(head, lines))


def print_speed(rows: Rows, codes: list[Code]) -> None:
    print("\nEncoding and decoding, one thread, median; ratios in this one run\n")
    values = {code.name: rows.values["speed", code.name, "ns per value"] for code in codes}
    least = min(values.values())
    lines = [[name, f"{ns:.2f}", f"{ns / least:.1f}"] for name, ns in values.items()]
    print(table(["code", "ns per value", "ratio"], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of `make data`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = arguments.seed
    rows = Rows(seed)
    codes, missing = all_codes()
    subjects = []
    for name, train in trainings(arguments.data_dir).items():
        try:
            momenta = train(seed, RECURSIVE_STEPS)
        except ValueError as error:
            missing[name] = str(error)
            continue
        first, last = momenta.losses
        print(f"{name}: {momenta.about}, training loss {first:.3f} -> {last:.3f}", flush=True)
        one_coding(rows, name, momenta, codes)
        recursive(rows, name, momenta, codes)
        subjects.append(name)
    synthetic(rows, codes, seed)
    timed = [code for code in codes if code.timed]
    try:
        timed.insert(0, kernel())
    except ImportError as error:
        missing["the kernel"] = str(error)
    speed(rows, timed, seed)

    print_errors(rows, subjects, codes)
    print_synthetic(rows, codes)
    print_speed(rows, timed)
    for name, reason in missing.items():
        print(f"\nskipped {name}: {reason}")
    rows.append_to(arguments.out)


if __name__ == "__main__":
    main()
