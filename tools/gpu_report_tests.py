"""The tests as a part of the GPU report: all results that there are, whatever happens."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_report_build import wait_for_wheels
from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report

TESTS = ROOT / "tests"
SHARED = "kernels/test_cuda.py"
"""Compares bits, so several processes may share the GPU; most of its time is the reference's."""
MOST_SHARDS = 4
MOST_STARTS = 12
"""Of one process, after crashes and hangs."""
TOLD, SHOWN = 60, 12
"""Tests that the report names, and of these, how many with what they say."""

KINDS = ("failed", "broken", "hung", "crashed", "skipped")


@dataclass
class Job:
    """Tests that run in one process, and what became of them."""

    name: str
    files: list[str]
    shard: str = "0/1"
    status: int | None = 0
    starts: int = 0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    collected: int = 0
    finished: bool = False
    lost: list[str] = field(default_factory=list)

    def read(self, path: Path) -> int:
        """Take in what the plugin has written; the number of lines."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.results, self.lost = {}, []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the process died while it wrote
                continue
            self.collected = entry.get("collected", self.collected)
            self.finished = self.finished or "finished" in entry
            self.lost += [entry["lost"]] if "lost" in entry else []
            if "test" in entry and "outcome" not in self.results.get(entry["test"], {}):
                self.results[entry["test"]] = entry
        return len(lines)


def jobs(shards: int) -> tuple[list[Job], Job]:
    """Those that run side by side, and the one that has the GPU for itself."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in TESTS.rglob("test_*.py")
        if "mark.cuda" in path.read_text(encoding="utf-8")
    )
    shared = [name for name in files if name.endswith(SHARED)]
    alone = [name for name in files if name not in shared]
    side_by_side = [Job(f"tests-{i}", shared, f"{i}/{shards}") for i in range(shards)]
    return side_by_side, Job("tests-device", alone)


def run_job(report: Report, part: Part, job: Job, within: float) -> None:
    """Run the tests of ``job``, and again without those that ended the process."""
    results = report.work / f"{job.name}.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "gpu_report_pytest", "-m", "cuda", "-q"]
    command += ["--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    command += job.files
    until, before = time.monotonic() + within, 0
    while job.starts < MOST_STARTS and not job.finished:
        job.starts += 1
        job.status = report.run(
            part,
            command,
            f"{job.name}.log",
            within=until - time.monotonic(),
            GPU_REPORT_RESULTS=str(results),
            GPU_REPORT_SHARD=job.shard,
        )
        now = job.read(results)
        ended = "out of time" if job.status is None else f"the process ended with {job.status}"
        for name, entry in job.results.items():
            if "outcome" not in entry:
                entry.update(test=name, outcome="crashed", message=ended)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        if job.status is None or now == before:
            break
        before = now


def tests(report: Report, part: Part) -> None:
    """All tests marked cuda; one that is skipped fails, because it could have run here."""
    wait_for_wheels(report, part)
    # A shard is two threads of the reference, and what torch does besides.
    shards = 1 if report.dry else max(1, min(MOST_SHARDS, len(os.sched_getaffinity(0)) // 3))
    shared, alone = jobs(shards)
    time_of_shared = 0.6 * report.left(part)
    with ThreadPoolExecutor(shards) as pool:
        for done in [pool.submit(run_job, report, part, job, time_of_shared) for job in shared]:
            done.result()
    run_job(report, part, alone, report.left(part))
    judge(report, part, [*shared, alone])


def judge(report: Report, part: Part, all_jobs: list[Job]) -> None:
    """Say how the tests ended."""
    found = {name: entry for job in all_jobs for name, entry in job.results.items()}
    bad = {k: [n for n, e in found.items() if e["outcome"] == k] for k in KINDS}
    passed = sum(entry["outcome"] == "passed" for entry in found.values())
    missing = sum(job.collected for job in all_jobs) - len(found)
    silent = [job for job in all_jobs if not job.finished]
    good = passed == len(found) > 0 and missing <= 0 and not silent
    if report.dry:
        broken = any(bad[kind] for kind in KINDS if kind != "skipped") or silent
        part.end(FAILED if broken else NOT_RUN, "no GPU")
    else:
        part.end(OK if good else FAILED)
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in bad.items())
    part.lines.append(f"{passed} passed, {counts}, {max(0, missing)} not reached")
    for job in silent:
        part.lines.append(f"{job.name} did not come to its end: status {job.status}, see its log")
        part.lines += [report.tail(f"{job.name}.log")] if not job.results else []
    part.lines += [f"the device was lost: {text}" for job in all_jobs for text in job.lost[:3]]
    told = [name for kind in KINDS for name in bad[kind] if not (report.dry and kind == "skipped")]
    for number, name in enumerate(told[:TOLD]):
        message = found[name].get("message", "").strip().splitlines()
        part.lines.append(f"{found[name]['outcome']}: {name}")
        part.lines += [f"    {line}" for line in message[-10 if number < SHOWN else -1 :]]
    part.lines += [f"and {len(told) - TOLD} more"] if len(told) > TOLD else []
    slow = sorted(found.items(), key=lambda item: -item[1].get("seconds", 0.0))[:5]
    part.lines += [f"{entry.get('seconds', 0):6.1f} s {name}" for name, entry in slow]
    failures(report, told, found)


def failures(report: Report, told: list[str], found: dict[str, dict[str, Any]]) -> None:
    """All that they say, into a log of its own: those of pytest are cut where they are long."""
    texts = [f"{found[n]['outcome']}: {n}\n{found[n].get('message', '')}\n" for n in told]
    if texts:
        (report.work / "failures.log").write_text("\n".join(texts), encoding="utf-8")
