"""The runs of docs/evidence.md, and the claims that they allow.

    python -m benchmarks.evidence run text-512     # resumes; Ctrl-C keeps what is finished
    python -m benchmarks.evidence summary          # from the rows in benchmarks/results/evidence

Each table is one study of ``came8bit tradeoff``, in ``results/evidence/NAME``; its results and
report are copied to ``benchmarks/results/evidence``, from where a study also goes on. The tests and
the margins are those that the protocol fixes, and every number of the page comes from here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from came8bit.cli import main as came8bit
from came8bit.tradeoff.config import OPTIMIZERS, label
from came8bit.tradeoff.report import Paired, number, paired, table

RUNS = Path("results/evidence")
ROWS = Path(__file__).parent / "results" / "evidence"

_CORE = "adamw,nadamw,came,came8bit,came4bit,came2bit"
_ALL = (
    "adamw,nadamw,adafactor,adamw8bit,came-pytorch,came-published,came-corrected,"
    "came,came8bit,came4bit,came2bit,came-adapm"  # the last was added when the others were done
)
TEXT = "--batch-size 8 --warmup-steps 100 --eval-items 1024"
_IMAGES = f"--tune --seeds 5 --optimizers {_CORE} --steps 200 --warmup-steps 20"

#: Arguments of ``came8bit tradeoff --preset quick --cpu``. ``{adamw}`` is AdamW's own learning rate
#: in text-512.
TABLES = {
    "text-512": f"--tune --seeds 8 --slow-seeds 3 --optimizers {_ALL} --steps 300 {TEXT}",
    "text-8k": (
        f"--tune --seeds 5 --optimizers {_CORE} --tasks llama --corpus gcide --layers 2 "
        "--batch-size 64 --steps 80 --warmup-steps 10 --mixed-precision bf16"
    ),
    "cnn": f"{_IMAGES} --tasks cnn",
    "vit": f"{_IMAGES} --tasks vision --layers 2 --width 128",
    "ddpm": f"{_IMAGES} --tasks ddpm --width 16 --batch-size 32",
    "minilm": f"--tune --seeds 5 --optimizers {_CORE} --tasks minilm",
    "minilm-again": (
        "--seeds 24 --first-seed 5 --optimizers adamw,came8bit --tasks minilm "
        "--lr adamw=1e-4 --lr came8bit=1e-4"
    ),
    "long": (
        f"--seeds 3 --optimizers adamw,came8bit,came2bit --steps 5000 --floor 0 {TEXT} "
        "--lr adamw={adamw} --lr came8bit={adamw} --lr came2bit={adamw}"
    ),
}

MARGIN = 0.005  # nat; for the squared error of ddpm a share of AdamW's loss:
_RELATIVE = {"ddpm": 0.02}


class Rows:
    """The runs of one table, read from its results."""

    def __init__(self, name: str) -> None:
        self.name = name
        content = json.loads((ROWS / f"{name}.json").read_text(encoding="utf-8"))
        self.rows: list[dict[str, Any]] = content["runs"]

    def optimizers(self) -> list[str]:
        """Return the optimizers with reported runs, in their order."""
        return list(dict.fromkeys(r["optimizer"] for r in self.rows if r["purpose"] == "final"))

    def rate(self, optimizer: str) -> float:
        """Return the optimizer's own learning rate: the best of its search, or of its leader's.

        Without any search it is the given one; NaN if this search has not been run yet.
        """
        losses: dict[float, list[float]] = {}
        for row in self._of("tune", OPTIMIZERS[optimizer].tuned_as or optimizer):
            losses.setdefault(row["lr"], []).append(float(row["loss"] or "inf"))
        if losses:
            return min(losses, key=lambda lr: statistics.fmean(losses[lr]))
        final = self._of("final", optimizer)
        searches = any(row["purpose"] == "tune" for row in self.rows)
        return float(final[0]["lr"]) if final and not searches else math.nan

    def losses(self, optimizer: str, lr: float) -> dict[int, float]:
        """Return seed → loss of the runs that ended well."""
        rows = self._of("final", optimizer, lr)
        return {row["seed"]: row["loss"] for row in rows if row["status"] == "ok"}

    def diverged(self, optimizer: str, lr: float) -> int:
        """Return how many of the runs did not end well."""
        return sum(row["status"] != "ok" for row in self._of("final", optimizer, lr))

    def margin(self) -> float:
        """Return the margin of equality, in the unit of the loss."""
        if self.name not in _RELATIVE:
            return MARGIN
        losses = self.losses("adamw", self.rate("adamw"))
        return _RELATIVE[self.name] * statistics.fmean(losses.values())

    def compare(self, first: str, second: str, lr: tuple[float, float]) -> Comparison | None:
        """Compare two optimizers at a learning rate each; None without two common seeds."""
        one, other = self.losses(first, lr[0]), self.losses(second, lr[1])
        result = paired(one, other, self.margin())
        if result is None or result.pairs < 2:
            return None
        gaps = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
        better = stats.ttest_1samp(gaps, 0, alternative="less").pvalue
        no_worse = stats.ttest_1samp(gaps, self.margin(), alternative="less").pvalue
        lost = self.diverged(first, lr[0])
        return Comparison(result, float(better), float(no_worse), lost)

    def below_null(self, result: Comparison) -> bool:
        """Return whether the difference is less than what rounding alone makes: the null control.

        The control is taken at each learning rate that both of its arms have been run at.
        """
        arms = ("came-published", "came-pytorch")
        rates = {self.rate("adamw"), self.rate(arms[0])}
        controls = [self.compare(*arms, (lr, lr)) for lr in rates]
        size = abs(result.paired.difference)
        return any(size < abs(c.paired.difference) for c in controls if c is not None)

    def _of(self, purpose: str, optimizer: str, lr: float | None = None) -> list[dict[str, Any]]:
        return [
            row
            for row in self.rows
            if (row["purpose"], row["optimizer"]) == (purpose, optimizer)
            and lr in (None, row["lr"])
        ]


class Comparison(NamedTuple):
    """A paired comparison, one-sided p values, and runs of the first that diverged."""

    paired: Paired
    p_better: float
    p_no_worse: float
    diverged: int


def holm(p_values: list[float]) -> list[float]:
    """Return p values adjusted by Holm's method (1979), in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def summary() -> str:
    """Return the claims as Markdown, from the rows of all tables that are there."""
    tables = [Rows(name) for name in TABLES if (ROWS / f"{name}.json").exists()]
    return "\n\n".join(
        [_losses(rows) for rows in tables]
        + [_against_adamw(tables), _rungs(tables), _unclaimed(tables)]
    )


def _losses(rows: Rows) -> str:
    equal = rows.rate("adamw")
    lines = []
    for name in rows.optimizers():
        cells = []
        for lr in (rows.rate(name), equal):
            losses = [*rows.losses(name, lr).values()]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            lost = rows.diverged(name, lr)
            cells.append(f"{statistics.fmean(losses):.4f}{spread}" if losses else "")
            cells[-1] += f"; {lost} diverged" if lost else ""
        state = rows._of("final", name)[0]["bytes_per_parameter"] or float("nan")
        own = rows.rate(name)
        seeds = max(len(rows.losses(name, lr)) for lr in (own, equal))
        known = "" if math.isnan(own) else f"{own:g}"
        lines.append([label(name), f"{state:.2f}", str(seeds), known, *cells])
    head = [rows.name, "B/param", "seeds", "own lr", "loss at own lr", f"loss at lr {equal:g}"]
    return table(head, lines)


def _against_adamw(tables: list[Rows]) -> str:
    """One family of one comparison a table and learning rate, corrected by Holm's method."""
    lines = []
    for kind in ("AdamW's lr", "own lr"):
        found = []
        for rows in tables:
            base = rows.rate("adamw")
            lr = base if kind == "AdamW's lr" else rows.rate("came8bit")
            result = rows.compare("came8bit", "adamw", (lr, base))
            if result:
                found.append((rows, lr, result))
        better = holm([result.p_better for _, _, result in found])
        no_worse = holm([result.p_no_worse for _, _, result in found])
        for (rows, lr, result), p, q in zip(found, better, no_worse, strict=True):
            worse = result.paired.outside_noise and result.paired.difference > 0
            said = "worse" if worse else "inside the noise"
            said = "better" if p < 0.05 else "no worse" if q < 0.05 else said
            said = "less than the null control" if p < 0.05 and rows.below_null(result) else said
            said = f"{result.diverged} diverged" if result.diverged else said
            lines.append(
                [rows.name, f"{kind}, {lr:g}", *_figures(result), f"{p:.1g}", f"{q:.1g}", said]
            )
    head = ["CAME8bit − AdamW", "lr", "difference", "95 % interval", "seeds"]
    return table([*head, "p better", "p no worse", "claim"], lines)


def _rungs(tables: list[Rows]) -> str:
    lines = []
    for rows in tables:
        for name in ("came8bit", "came4bit", "came2bit"):
            rates = {rows.rate("came"): "own lr", rows.rate("adamw"): "AdamW's lr"}
            for lr, kind in rates.items():
                result = rows.compare(name, "came", (lr, lr))
                if result:
                    said = "equal" if result.paired.equal else "inside the noise"
                    if result.paired.outside_noise and rows.below_null(result):
                        said = "less than the null control"
                    elif result.paired.outside_noise:
                        said = "better" if result.paired.difference < 0 else "worse"
                        said += ", within the margin" if result.paired.equal else ""
                    lines.append(
                        [f"{rows.name}, {label(name)}", f"{kind}, {lr:g}", *_figures(result), said]
                    )
    head = ["momentum, against 32 bits", "lr", "difference", "95 % interval", "seeds", "claim"]
    return table(head, lines)


def _unclaimed(tables: list[Rows]) -> str:
    """Question 3 and what was added later, which are exploratory, and the null control."""
    pairs = [("nadamw", "adamw"), ("came8bit", "nadamw"), ("came-published", "came-pytorch")]
    pairs += [("came-adapm", other) for other in ("adamw", "came", "came4bit")]
    lines = []
    for rows in tables:
        equal = rows.rate("adamw")
        for first, second in pairs:
            own = (rows.rate(first), rows.rate(second))
            for lr in dict.fromkeys([own, (equal, equal)]):
                result = rows.compare(first, second, lr)
                if result:
                    difference = f"{rows.name}, {label(first)} − {label(second)}"
                    lines.append([difference, f"{lr[0]:g}, {lr[1]:g}", *_figures(result)])
    return table(["not claimed", "lr", "difference", "95 % interval", "seeds"], lines)


def _figures(result: Comparison) -> list[str]:
    # There are two seeds at least, and so an interval.
    interval = f"{number(result.paired.low or 0.0)} to {number(result.paired.high or 0.0)}"
    return [number(result.paired.difference), interval, str(result.paired.pairs)]


def arguments(name: str, adamw: float) -> list[str]:
    """Return the command line of a table's study, given AdamW's learning rate in text-512."""
    words = TABLES[name].format(adamw=f"{adamw:g}").split()
    return ["tradeoff", "--preset", "quick", "--cpu", *words, "--out", str(RUNS / name)]


def run(name: str, more: list[str]) -> int:
    """Do the runs of a table that are missing; return the exit code of the study."""
    adamw = Rows("text-512").rate("adamw") if "{adamw}" in TABLES[name] else 0.0
    made, kept = RUNS / name, ROWS / f"{name}.json"
    if kept.exists() and not (made / "results.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, made / "results.json")
    code = came8bit([*arguments(name, adamw), *more])
    ROWS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made / "results.json", kept)
    shutil.copyfile(made / "report.md", ROWS / f"{name}.md")
    return code


def main() -> int:
    """Run a table, or print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run one table; other arguments go to the study")
    running.add_argument("table", choices=list(TABLES))
    commands.add_parser("summary", help="print the losses and the claims as Markdown")
    args, more = parser.parse_known_args()
    if args.command == "run":
        return run(args.table, more)
    print(summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
