"""The rule with one part changed: is that part worth what it costs?

    python -m benchmarks.ablations run             # resumes; Ctrl-C keeps what is finished
    python -m benchmarks.ablations summary         # from benchmarks/results/ablations.csv

:class:`Variant` is CAME with bias correction and Nesterov's direction, fp32 momentum, in plain
PyTorch, for vectors and matrices. It keeps full averages, of which the rule's own state is the row
and column means, so that every variant starts from the same numbers. The runs are a study of
``came8bit tradeoff`` in the setting of table ``text-512`` of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import evidence
from came8bit.cli import main as came8bit
from came8bit.tradeoff.config import OPTIMIZERS, OptimizerSpec
from came8bit.tradeoff.report import number, paired, table

RUNS = Path("results/ablations")
ROWS = Path(__file__).parent / "results" / "ablations.csv"

OWN_LR, ADAMW_LR = 2e-3, 1e-3  # of CAME and of AdamW in text-512
BETA1, BETA2, BETA3 = 0.9, 0.999, 0.9999
EPS1, EPS2 = 1e-30, 1e-16
ITERATIONS = 2  # of the factors of a higher rank, at every step

#: Name → what is different, and the options of :class:`Variant`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("the rule", {}),
    "rank2": ("second moment of rank 2", dict(rank=2)),
    "rank4": ("second moment of rank 4", dict(rank=4)),
    "full-instability": ("full instability", dict(full_instability=True)),
    "no-confidence": ("no confidence term", dict(confidence=False)),
}


# ---- the rule ----


def rank_one(x: Tensor) -> Tensor:
    """Return the best approximation of rank 1 by I-divergence: row means times column means."""
    return x.mean(1, keepdim=True) * x.mean(0, keepdim=True) / x.mean()


class Factors:
    """Nonnegative factors of a matrix that changes slowly.

    Each call does a fixed number of the multiplicative updates for the I-divergence (Lee and Seung,
    2001), from where the last call ended. With rank 1 the first of them is exact.
    """

    def __init__(self, x: Tensor, rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = (torch.rand(n, rank, generator=generator) + 0.5 for n in x.shape)
        self.rows = rows.to(x) * x.mean(1, keepdim=True)
        self.columns = columns.to(x) * (x.mean(0) / x.mean())[:, None]

    def approximate(self, x: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """Return the approximation of ``x`` after some more updates."""
        for _ in range(iterations):
            self.rows *= _quotient(x, self.product()) @ self.columns / _sum(self.columns)
            self.columns *= _quotient(x, self.product()).T @ self.rows / _sum(self.rows)
        return self.product()

    def product(self) -> Tensor:
        """Return what the factors stand for."""
        return self.rows @ self.columns.T


def _quotient(x: Tensor, product: Tensor) -> Tensor:
    return x / product.clamp_min(EPS1)


def _sum(factor: Tensor) -> Tensor:
    return factor.sum(0).clamp_min(EPS1)


class Variant(torch.optim.Optimizer):
    """CAME, and what it could be instead.

    Args:
        params, lr, weight_decay: as of any optimizer.
        rank: of the second moment of matrices.
        full_instability: keep the average of each element's instability, not the means of rows and
            columns.
        confidence: divide by the root of the instability.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        rank: int = 1,
        full_instability: bool = False,
        confidence: bool = True,
    ) -> None:
        self.rank, self.full_instability, self.confidence = rank, full_instability, confidence
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    direction = self._direction(param.grad, self.state[param])
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(direction, alpha=group["lr"])

    def _direction(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = 0
            state |= {name: torch.zeros_like(g) for name in ("v", "m", "s")}
        state["step"] = t = state["step"] + 1
        v: Tensor = state["v"].lerp_(g * g + EPS1, 1 - BETA2)
        u = g / (self._second_moment(v, state) / (1 - BETA2**t)).sqrt()
        u /= u.square().mean().sqrt().clamp_min(1.0)
        m: Tensor = state["m"].lerp_(u, 1 - BETA1)
        direction = (BETA1 * m + (1 - BETA1) * u) / (1 - BETA1 ** (t + 1))
        if g.dim() < 2 or not self.confidence:
            return direction
        s: Tensor = state["s"].lerp_((u - m).square() + EPS2, 1 - BETA3)
        s = s if self.full_instability else rank_one(s)
        return direction / (s / (1 - BETA3**t)).sqrt()

    def _second_moment(self, v: Tensor, state: dict[str, Any]) -> Tensor:
        if v.dim() < 2:
            return v
        if self.rank == 1:
            return rank_one(v)
        if "factors" not in state:
            state["factors"] = Factors(v, self.rank)
        factors: Factors = state["factors"]
        return factors.approximate(v)


# ---- the study ----


def register() -> list[str]:
    """Make the variants arms of ``came8bit tradeoff`` in this process; return their names."""
    for place, (name, (label, options)) in enumerate(VARIANTS.items()):
        path = "benchmarks.ablations.Variant"
        OPTIMIZERS[name] = OptimizerSpec(label, path, options, OWN_LR, f"C{place}", "o")
    return list(VARIANTS)


def run(more: list[str]) -> int:
    """Do the runs that are missing; return the exit code of the study."""
    words = f"--preset quick --cpu --in-process --seeds 3 --steps 300 {evidence.TEXT}".split()
    words += ["--optimizers", ",".join(register()), "--equal-lr", f"{ADAMW_LR:g}"]
    code = came8bit(["tradeoff", *words, "--out", str(RUNS), *more])
    shutil.copyfile(RUNS / "runs.csv", ROWS)
    return code


def summary() -> str:
    """Return the losses and the paired differences from the rule, as Markdown."""
    losses: dict[tuple[str, float], dict[int, float]] = {}
    with ROWS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok":
                of = losses.setdefault((row["optimizer"], float(row["lr"])), {})
                of[int(row["seed"])] = float(row["loss"])
    lines = []
    for lr in (OWN_LR, ADAMW_LR):
        base = losses[("base", lr)]
        kernels = evidence.Rows("text-512").losses("came", lr)
        kernels = {seed: kernels[seed] for seed in base}
        lines.append(_line("the rule, by the kernels", lr, kernels, base))
        for name, (label, _) in VARIANTS.items():
            lines.append(_line(label, lr, losses[(name, lr)], base))
    head = ["text-512", "lr", "loss", "less the rule", "95 % interval", "seeds"]
    return table(head, lines)


def _line(label: str, lr: float, losses: dict[int, float], base: dict[int, float]) -> list[str]:
    mean = f"{statistics.fmean(losses.values()):.4f} ± {statistics.stdev(losses.values()):.4f}"
    result = paired(losses, base, evidence.MARGIN)
    if losses is base or result is None:
        return [label, f"{lr:g}", mean, "", "", str(len(losses))]
    interval = f"{number(result.low or 0.0)} to {number(result.high or 0.0)}"
    return [label, f"{lr:g}", mean, number(result.difference), interval, str(result.pairs)]


def main() -> int:
    """Run the variants, or print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["run", "summary"])
    args, more = parser.parse_known_args()
    if args.command == "run":
        return run(more)
    print(summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
