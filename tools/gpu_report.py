"""Everything that needs a GPU, in one go and in eight minutes: build, tests, sanitizer, benchmarks.

    make gpu-wheels && make gpu-report OUT=report          the wheels are those of other optimizers
    python tools/gpu_report.py --out report --dry-run    without a GPU: tries the plumbing, tiny
    python tools/gpu_report.py --out report --keep --parts capped,others --budget 200
    python tools/gpu_report.py --out report --build-for 9.0     without a GPU: only the libraries

It needs a Python with torch for CUDA, pytest and hypothesis, and nvcc, cmake and ninja; it installs
nothing into it and reaches no network. The libraries are built into ``came8bit/`` of this folder.
What is missing or fails is said, the rest goes on, and the exit status is 1 at the end if a part
failed. Missed targets are no failure: they are listed.

Parts run in the order of their value, each with a limit; what one leaves over is for the next.
Written to the folder, after every part: ``report.md`` and ``report.json``, the figures
(``gpu.json``, ``gpu.csv``), and ``logs.txt`` with beginnings and ends of all logs. The work folder
has whole logs, the build and the unpacked wheels, and is emptied first unless ``--keep`` says not
to; then libraries that were built from these sources for this GPU are not built again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gpu_report_build import build, facts, peers, start_peers
from gpu_report_figures import bench, capped
from gpu_report_run import FAILED, MARGIN, NOT_RUN, ROOT, Part, Report, revision, shortened
from gpu_report_sanitizer import sanitizer
from gpu_report_tests import tests

BUDGET = 480.0


class Row(NamedTuple):
    """A part: seconds that are kept for it, and that it may take of what others leave over."""

    name: str
    limit: float
    most: float
    function: Callable[[Report, Part], None]


PARTS = (
    Row("facts", 20, 60, facts),
    Row("build", 90, 180, build),
    Row("tests", 100, 160, tests),
    Row("memcheck", 50, 90, sanitizer("memcheck")),
    Row("peers", 10, 30, peers),
    Row("benchmarks", 75, 110, bench("benchmarks")),
    Row("scans", 35, 60, bench("scans")),
    Row("racecheck", 35, 60, sanitizer("racecheck")),
    Row("capped", 15, math.inf, capped),
    Row("others", 40, math.inf, bench("others")),
)


# --- the report -----------------------------------------------------------------------------------


def table(report: Report) -> list[str]:
    """How the parts ended."""
    lines = ["| part | | seconds |", "|---|---|---|"]
    return lines + [f"| {p.name} | {p.status} | {p.seconds:.0f} |" for p in report.parts]


def text_of(report: Report) -> str:
    """The report for reading."""
    title = "GPU report" + (" (dry run without a GPU)" if report.dry else "")
    lines = [f"# {title}", "", *table(report)]
    for part in report.parts:
        lines += ["", f"## {part.name}: {part.status}", "", "```", *part.lines, "```"]
    return "\n".join(lines) + "\n"


def logs_of(report: Report) -> str:
    """Beginnings and ends of all logs, what failing tests say first."""
    paths = sorted(report.work.glob("*.log"), key=lambda p: (p.stem != "failures", p.name))
    return "\n".join(f"===== {path.stem}\n{shortened(report.text(path.name))}" for path in paths)


def write(report: Report) -> None:
    """Write what is known so far: a run that is stopped leaves that."""
    names = ("name", "limit", "status", "lines", "seconds")
    parts = [{name: getattr(part, name) for name in names} for part in report.parts]
    content: dict[str, Any] = {"dry_run": report.dry, "git": revision(), "parts": parts}
    for name, text in (
        ("report.json", json.dumps(content, indent=1) + "\n"),
        ("report.md", text_of(report)),
        ("logs.txt", logs_of(report)),
    ):
        new = report.out / f"{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(report.out / name)


def run_part(report: Report, row: Row, later: list[Row]) -> None:
    """Run one part, whatever happens in it."""
    part = Part(row.name, row.limit, row.most)
    report.parts.append(part)
    report.reserved = sum(other.limit for other in later)
    print(f"{row.name}: {(row.function.__doc__ or '').splitlines()[0]}", flush=True)
    try:
        if report.deadline - MARGIN - time.monotonic() < 5:
            part.end(NOT_RUN, "out of time")
        else:
            row.function(report, part)
    except Exception as error:
        part.end(FAILED, f"{type(error).__name__}: {error}")
    finally:
        part.seconds = time.monotonic() - part.begun
        print(f"  {part.status} after {part.seconds:.0f} s", flush=True)
        write(report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="of other optimizers")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-report")
    parser.add_argument("--keep", action="store_true", help="use what is in the work folder")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--parts", help=f"of {', '.join(row.name for row in PARTS)}")
    parser.add_argument("--build-for", default="", metavar="9.0", help="only build, for that GPU")
    parser.add_argument("--dry-run", action="store_true", help="try the plumbing without a GPU")
    options = parser.parse_args(arguments)
    names = [row.name for row in PARTS]
    options.parts = options.parts.split(",") if options.parts else names
    if options.build_for:
        options.parts = ["build"]
    unknown = set(options.parts) - set(names)
    if unknown:
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, see --help")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run all parts or those that are named."""
    options = parse(arguments)
    report = Report(
        out=options.out.resolve(),
        dry=options.dry_run,
        deadline=time.monotonic() + options.budget,
        wheels=options.wheels.resolve(),
        work=options.work.resolve(),
        keep=options.keep,
        build_for=options.build_for,
    )

    def told_to_end(*_: object) -> NoReturn:
        report.stop()
        raise SystemExit(1)

    # A shell may have had the first one ignored, which programs inherit.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: told_to_end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if not report.keep:
        shutil.rmtree(report.work, ignore_errors=True)
    report.work.mkdir(parents=True, exist_ok=True)
    for log in report.work.glob("*.log"):
        log.unlink()
    report.out.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in PARTS if row.name in options.parts]
    try:
        if "peers" in options.parts:
            start_peers(report)
        for number, row in enumerate(chosen):
            run_part(report, row, chosen[number + 1 :])
    finally:
        report.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
        write(report)
        print(text_of(report))
        print("\n".join(table(report)))
    return int(any(part.status == FAILED for part in report.parts))


if __name__ == "__main__":
    sys.exit(main())
