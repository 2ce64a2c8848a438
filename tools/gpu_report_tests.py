"""The tests as a part of the GPU report: all results that there are, whatever happens.

pytest-xdist replaces a worker that dies, pytest-timeout ends one that hangs, the plugin
``gpu_worker`` one that has lost the device, and pytest-reportlog writes each result at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report

SHARED = "kernels/test_cuda.py"
"""Compares bits, so several processes may share the GPU; most of its time is the reference's."""
MOST_WORKERS = 4
HANG_SECONDS = 45
TOLD, SHOWN = 60, 12
"""Tests that the report names, and of these, how many with what they say."""

KINDS = ("failed", "error", "crashed", "skipped", "not reached")


@dataclass
class Session:
    """A run of pytest and what became of its tests."""

    name: str
    status: int | None = None
    finished: bool = False
    """Whether pytest came to its end."""
    kinds: dict[str, str] = field(default_factory=dict)
    """``passed`` or one of KINDS, by test; the first phase that went wrong counts."""
    messages: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Why the device was lost."""

    def take(self, entry: dict[str, Any]) -> None:
        """Take in a line of the report log."""
        self.finished = self.finished or entry.get("exitstatus") in (0, 1, 5)
        test, when, outcome = entry.get("nodeid"), entry.get("when"), entry.get("outcome")
        if test is None or (entry["$report_type"] == "CollectReport" and outcome == "passed"):
            return
        self.seconds[test] = self.seconds.get(test, 0.0) + entry.get("duration", 0.0)
        self.lost += [why for title, why in entry.get("sections", ()) if title == "device lost"]
        if outcome == "failed":
            kind = {"call": "failed", "???": "crashed"}.get(when, "error")
        else:
            kind = outcome if outcome == "skipped" or when == "teardown" else "not reached"
        if self.kinds.get(test, "not reached") == "not reached":
            self.kinds[test] = kind
            self.messages[test] = message(entry["longrepr"])


def message(longrepr: Any) -> str:
    """Return what a failing or skipped test says, of a line of the report log."""
    if isinstance(longrepr, dict):
        crash = longrepr["reprcrash"]
        return f"{crash['path']}:{crash['lineno']}: {crash['message']}" if crash else str(longrepr)
    return str(longrepr[-1] if isinstance(longrepr, list) else longrepr or "")


def run_pytest(
    report: Report, part: Part, name: str, files: list[Path], workers: int, seconds: float
) -> Session:
    """Run the tests of ``files`` that are marked cuda."""
    log, collected = report.work / f"{name}.jsonl", report.work / f"{name}.collected"
    for path in (log, collected):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--tb=short", "-n", workers]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "gpu_worker"]
    command += ["--max-worker-restart", 12, "--timeout-method", "thread", "--report-log", log]
    # Where a hanging test was is for the log; a moment later its worker ends.
    command += ["--timeout", HANG_SECONDS, "-o", f"faulthandler_timeout={HANG_SECONDS - 1}"]
    variables = {"HYPOTHESIS_PROFILE": "gpu", "GPU_REPORT_COLLECTED": str(collected)}
    session = Session(name)
    session.status = report.run(part, *command, *files, seconds=seconds, **variables)
    for test in collected.read_text(encoding="utf-8").splitlines() if collected.exists() else ():
        session.kinds[test] = "not reached"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # it may have been stopped while it wrote
            session.take(json.loads(line))
    return session


def tests(report: Report, part: Part) -> None:
    """All tests marked cuda; one that is skipped fails, because it could have run here."""
    if report.peers.is_alive():
        report.peers.unpacked.wait(min(60.0, part.left()))  # pytest's plugins are among the wheels
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    shared = [path for path in files if path.as_posix().endswith(SHARED)]
    # A worker is two threads of the reference, and what torch does besides.
    workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 3))
    first = run_pytest(report, part, "shared", shared, workers, 0.6 * part.left())
    # What looks at the memory or the time of the device has it for itself.
    alone = [path for path in files if path not in shared]
    judge(report, part, [first, run_pytest(report, part, "alone", alone, 1, part.left())])


def judge(report: Report, part: Part, sessions: list[Session]) -> None:
    """Say how the tests ended."""
    kinds = {test: kind for session in sessions for test, kind in session.kinds.items()}
    messages = {test: text for session in sessions for test, text in session.messages.items()}
    bad = {kind: [test for test, found in kinds.items() if found == kind] for kind in KINDS}
    unfinished = [session for session in sessions if not session.finished]
    passed = sum(kind == "passed" for kind in kinds.values())
    counts = ", ".join(f"{len(tests)} {kind}" for kind, tests in bad.items())
    if report.dry:
        bad["skipped"] = []  # as it should be
        broken = unfinished or any(bad.values())
        part.end(FAILED if broken else NOT_RUN, "no GPU")
    else:
        part.end(OK if passed == len(kinds) > 0 and not unfinished else FAILED)
    part.lines.append(f"{passed} passed, {counts}")
    for session in unfinished:
        ended = "ran out of time" if session.status is None else f"ended with {session.status}"
        part.lines += [f"pytest ({session.name}) {ended}:", report.tail(part)]
    part.lines += [f"the device was lost: {why}" for session in sessions for why in session.lost]
    told = [(kind, test) for kind, tests in bad.items() for test in tests]
    for number, (kind, test) in enumerate(told[:TOLD]):
        said = messages.get(test, "").strip().splitlines()
        part.lines.append(f"{kind}: {test}")
        part.lines += [f"    {line}" for line in said[-10 if number < SHOWN else -1 :]]
    part.lines += [f"and {len(told) - TOLD} more"] if len(told) > TOLD else []
    seconds = [(time, test) for session in sessions for test, time in session.seconds.items()]
    part.lines += [f"{time:6.1f} s {test}" for time, test in sorted(seconds, reverse=True)[:5]]
