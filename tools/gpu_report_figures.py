"""Parts of the GPU report that measure: the benchmark in pieces, the job under a cap on memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from gpu_report_build import wait_for
from gpu_report_run import FAILED, NOT_RUN, OK, Part, Report

BENCH = {
    "benchmarks": "Time, bandwidth and memory against bitsandbytes and fused AdamW.",
    "scans": "Kernels one by one, and what the variables of the environment change.",
    "others": "CAME8bit against the slower optimizers.",
}
"""Parts that are pieces of ``benchmarks/gpu_step``; what each is about."""
MARKS = ("    ", "copy:", "not run:", "holds", "MISSED")
"""Beginnings of the lines of its log that the report shows."""


def bench(piece: str) -> Callable[[Report, Part], None]:
    """A part that runs one piece of the benchmark in a process of its own."""

    def run(report: Report, part: Part) -> None:
        if piece == "others":  # one of them may still be compiled
            wait_for(report, "all done", report.left(part) / 2)
        log, path = f"{piece}.log", report.out / "gpu.json"
        # It writes after every case, so what it is stopped in is all that is lost.
        seconds = min(report.left(part), 30.0) if report.dry else report.left(part) - 10
        command = [sys.executable, "-m", "benchmarks.gpu_step"]
        command += ["--out", str(report.out), "--pieces", piece, "--add"]
        command += ["--seconds", f"{max(5.0, seconds):.0f}"]
        command += ["--device", "cpu"] if report.dry else []
        status = report.run(part, command, log)
        said = report.text(log).splitlines()
        if status == 0 and path.exists():
            part.end(NOT_RUN if report.dry else OK, "no GPU; tiny cases on the CPU" * report.dry)
        else:
            part.end(FAILED, f"gave {status}, what was measured before is kept:", report.tail(log))
        part.lines += [line for line in said if " x ours" in line or line.startswith(MARKS)]

    run.__doc__ = BENCH[piece]
    return run


def capped(report: Report, part: Part) -> None:
    """A 7B-shaped Llama under a cap on memory, in the time that is left."""
    folder = report.work / "capped"
    command = [sys.executable, "-m", "benchmarks.memory_cap", "--out", str(folder)]
    command += ["--seconds", f"{max(10.0, report.left(part) - 10):.0f}"]
    command += ["--device", "cpu", "--rehearse", "--steps", "2"] if report.dry else []
    status = report.run(part, command, "capped.log")
    path = folder / "memory_cap.json"
    if not path.exists():
        part.end(FAILED, f"gave {status}:", report.tail("capped.log"))
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    figures = report.out / "gpu.json"
    others = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    text = json.dumps({**others, "capped": result}, indent=1) + "\n"
    new = figures.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(figures)
    part.end(FAILED if status != 0 else NOT_RUN if report.dry else OK)
    part.lines += ["no GPU; tiny shapes ran on the CPU"] * report.dry
    part.lines += [t["text"] for t in result["targets"]]
    part.lines += [f"not run: {item['what']}: {item['why']}" for item in result["not_run"]]
