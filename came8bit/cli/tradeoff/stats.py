"""Mean, spread, and Student's t interval of paired differences; no dependency but ``math``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n − 1), or None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class Paired:
    """A comparison of two optimizers over the seeds that both have run.

    Attributes:
        pairs: Number of common seeds.
        difference: Mean of (first − second).
        deviation: Standard deviation of the differences; None for one pair.
        low, high: Ends of the interval; None for one pair.
    """

    pairs: int
    difference: float
    deviation: float | None
    low: float | None
    high: float | None

    @property
    def outside_noise(self) -> bool | None:
        """Whether the interval leaves out 0; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def paired(
    first: dict[int, float], second: dict[int, float], confidence: float = 0.95
) -> Paired | None:
    """Compare values by seed with a t interval of their differences; None without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    centre, spread = mean(differences), deviation(differences)
    if spread is None:
        return Paired(1, centre, None, None, None)
    half = interval_factor(len(seeds), confidence) * spread
    return Paired(len(seeds), centre, spread, centre - half, centre + half)


def interval_factor(n: int, confidence: float = 0.95) -> float:
    """Return t/√n: half the interval of a mean of n ≥ 2 values, in standard deviations."""
    return t_quantile(0.5 + confidence / 2, n - 1) / math.sqrt(n)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution for ``probability`` in [0.5, 1).

    By bisection of the distribution function: with t = √ν·tan θ the density becomes cos^(ν−1) θ,
    smooth and bounded, which Simpson's rule integrates to about ten digits.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def distribution(angle: float) -> float:
        steps = 400
        width = angle / steps
        total = 1.0 + math.cos(angle) ** (degrees - 1)
        for i in range(1, steps):
            total += (4 if i % 2 else 2) * math.cos(i * width) ** (degrees - 1)
        return 0.5 + scale * total * width / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)
