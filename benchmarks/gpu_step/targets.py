"""Which of the targets for a GPU hold, from the figures of one run.

They are for an H200, where a matrix fits the cache if gradient and codes take half of it; on other
GPUs the same lines are printed, with that GPU's cache and copy bandwidth.

Kernels are judged, so times are of the device alone (``measure.py``); where a step cannot
be timed so, both sides of its ratio are plain times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.peers import BITSANDBYTES, OURS

LARGE = 64 << 20
"""Elements of a tensor from which the bandwidth is judged."""
BOUND = {"bfloat16": 1.3, "float32": 1.45}
"""Time over that of AdamW8bit's bytes at copy bandwidth, where a matrix does not fit the cache."""


def target(what: str, got: float, sign: str, limit: float, kind: str) -> dict[str, Any]:
    """One line; ``kind`` is "target", "goal" or "stretch"."""
    holds = got <= limit if sign == "≤" else got >= limit
    verdict = "holds " if holds else "MISSED"
    return {
        "what": what,
        "got": got,
        "sign": sign,
        "limit": limit,
        "kind": kind,
        "holds": holds,
        "text": f"{verdict} {kind}: {what}: {got:.4g} {sign} {limit:g}",
    }


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge a result of ``__main__.py``; empty where there was no GPU."""
    if "l2_bytes" not in result["about"]:
        return []
    rows = {(r["case"], r["dtype"], r["optimizer"]): r for r in result["rows"]}
    found: list[dict[str, Any]] = []
    for (case, dtype, optimizer), row in rows.items():
        if optimizer == OURS:
            found += _ours(row, result)
            continue
        where = f"{case} {dtype}" + ("" if row["covered"] else " (plain times)")
        ratio = row["time_over_ours_p50"]
        if optimizer == BITSANDBYTES:
            fits = row["largest_swept_bytes"] <= result["about"]["l2_bytes"] / 2
            kind = "target" if fits else "goal"
            found.append(target(f"{where}: {OURS} / {BITSANDBYTES}", 1 / ratio, "≤", 1.0, kind))
        elif optimizer == "came-pytorch":
            found.append(target(f"{where}: came-pytorch / {OURS}", ratio, "≥", 7.0, "target"))
        elif optimizer == "adafactor8bit CAME" and not row["remark"]:
            found.append(target(f"{where}: adafactor8bit / {OURS}", ratio, "≥", 1.5, "target"))
    return found


def _ours(row: dict[str, Any], result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Targets that need no other optimizer."""
    where = f"{row['case']} {row['dtype']}"
    copy = result["copy"]["bytes_per_second"]
    if row["largest_swept_bytes"] > result["about"]["l2_bytes"] / 2:
        ideal = row["adamw8bit_bytes"] / copy
        yield target(
            f"{where}: time over that of AdamW8bit's bytes at copy bandwidth",
            row["p50_ms"] / 1e3 / ideal,
            "≤",
            BOUND[row["dtype"]],
            "target",
        )
    if row["tensors"] == 1 and row["numel"] >= LARGE:
        what = f"{where}: bandwidth of the counted bytes over copy bandwidth"
        yield target(what, row["of_copy"], "≥", 0.85, "target")
    if row["dtype"] == "bfloat16" and row["numel"] >= LARGE:
        yield target(f"{where}: ms per 10⁹ parameters", row["ms_per_1e9"], "≤", 2.7, "stretch")
    if row["extra_bytes"] is not None:
        allowed = (0.005 * row["param_bytes"] + 8e6) / 1e6
        got = row["extra_bytes"] / 1e6
        yield target(f"{where}: extra MB of a step", got, "≤", allowed, "target")
