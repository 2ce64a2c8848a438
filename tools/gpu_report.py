"""Run everything that needs a GPU: build, tests, sanitizer, benchmarks; write a report.

    make gpu-wheels && make gpu-report OUT=report          the wheels are those of other optimizers
    python tools/gpu_report.py --out report --budget 480 --keep --parts build,tests
    python tools/gpu_report.py --out report --dry-run             without a GPU: tries the plumbing
    python tools/gpu_report.py --out report --build-for 9.0       without a GPU: only the libraries

It needs a Python with torch for CUDA and pytest, and nvcc, cmake and ninja; it installs nothing
into it and reaches no network. The libraries are built into ``came8bit/`` of this folder.

Parts run in the order of their value, each with a limit. With ``--budget`` each gets a share of the
seconds that are left, in proportion to its limit. A part that fails does not stop the others; the
exit status is 1 if one failed. Missed targets are listed and are not failures.

The report is written after every part: ``report.md``, ``report.json``, ``logs.txt`` with beginnings
and ends of all logs, and the figures as the benchmarks find them. The work folder has whole logs,
the build and the unpacked wheels. It is emptied first unless ``--keep`` is given; then libraries
that were built from these sources for this GPU are not built again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from gpu_report_parts import build, capped, facts, peers, sanitizer, step_times
from gpu_report_run import FAILED, NOT_RUN, ROOT, Part, Report
from gpu_report_tests import tests

MARGIN = 5.0
"""Seconds of the budget that are left for writing the report."""


class Row(NamedTuple):
    """A part and the seconds that it may take."""

    name: str
    limit: float
    function: Callable[[Report, Part], None]


PARTS = (
    Row("facts", 60, facts),
    Row("build", 600, build),
    Row("tests", 900, tests),
    Row("memcheck", 300, sanitizer("memcheck")),
    Row("peers", 60, peers),
    Row("benchmarks", 360, step_times("benchmarks")),
    Row("scans", 200, step_times("scans")),
    Row("racecheck", 240, sanitizer("racecheck")),
    Row("capped", 500, capped),
    Row("others", 300, step_times("others")),
)


def share(limits: Sequence[float], left: float) -> float:
    """Return the seconds of the first of some parts, of which ``left`` are left for all."""
    return min(limits[0], left * limits[0] / sum(limits))


def run_part(report: Report, row: Row, seconds: float) -> None:
    """Run one part, whatever happens in it."""
    begin = time.monotonic()
    part = Part(row.name, begin + seconds)
    report.parts.append(part)
    print(
        f"{row.name}, {seconds:.0f} s: {(row.function.__doc__ or '').splitlines()[0]}", flush=True
    )
    try:
        if seconds < 1:
            part.end(NOT_RUN, "out of time")
        else:
            row.function(report, part)
    except Exception as error:
        part.end(FAILED, f"{type(error).__name__}: {error}")
    finally:
        part.seconds = time.monotonic() - begin
        print(f"  {part.status} after {part.seconds:.0f} s", flush=True)
        report.write()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [row.name for row in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="of other optimizers")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-report")
    parser.add_argument("--keep", action="store_true", help="use what is in the work folder")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--parts", help=f"of {', '.join(names)}")
    parser.add_argument("--build-for", default="", metavar="9.0", help="only build, for that GPU")
    parser.add_argument("--dry-run", action="store_true", help="try the plumbing without a GPU")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",") if options.parts else names
    if options.build_for:
        options.parts = ["build"]
    unknown = set(options.parts) - set(names)
    if unknown:
        parser.error(
            f"--parts: got {', '.join(sorted(unknown))}, expected some of {', '.join(names)}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run all parts or those that are named; return 1 if one failed."""
    options = parse(arguments)
    deadline = time.monotonic() + options.budget - MARGIN
    out, work = options.out.resolve(), options.work.resolve()
    report = Report(
        out, work, options.wheels.resolve(), options.dry_run, options.keep, options.build_for
    )

    def told_to_end(*_: object) -> NoReturn:
        report.stop()
        raise SystemExit(1)

    # A shell may have had the first one ignored, which programs inherit.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: told_to_end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if not report.keep:
        shutil.rmtree(work, ignore_errors=True)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    for log in work.glob("*.log"):
        log.unlink()
    chosen = [row for row in PARTS if row.name in options.parts]
    try:
        if "peers" in options.parts and not (report.dry or report.build_for):
            report.peers.start()
        for number, row in enumerate(chosen):
            limits = [other.limit for other in chosen[number:]]
            run_part(report, row, share(limits, deadline - time.monotonic()))
    finally:
        report.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
        report.write()
        print(report.markdown())
        print("\n".join(report.table()))
    return int(any(part.status == FAILED for part in report.parts))


if __name__ == "__main__":
    sys.exit(main())
