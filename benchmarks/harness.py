"""What the benchmarks keep of a run: percentiles, and rows appended to a CSV file."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def quantiles(values: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    picked = {f"p{q}": ordered[round(q / 100 * last)] for q in (20, 80)}
    return {"p20": picked["p20"], "p50": statistics.median(ordered), "p80": picked["p80"]}


def append(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Append to the CSV; a file with other columns is left alone."""
    lines = list(rows)
    if not lines:
        return
    names = list(lines[0])
    old = path.read_text(encoding="utf-8").splitlines()[:1] if path.exists() else []
    if old and old[0] != ",".join(names):
        raise SystemExit(f"{path} has other columns than this version writes; move it away first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerows(lines)
