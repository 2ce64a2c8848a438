"""Everything that needs a GPU, in one go and in ten minutes: build, tests, sanitizer, benchmarks.

    make gpu-wheels && make gpu-report OUT=report          the wheels are those of other optimizers
    python scripts/gpu_report.py --out report --dry-run    without a GPU: tries the plumbing, tiny

It needs a Python with torch for CUDA, pytest and hypothesis, and nvcc, cmake and ninja; it installs
nothing into it and reaches no network. The libraries are built into ``came8bit/`` of this folder.
What is missing or fails is said, the rest goes on, and the exit status is 1 at the end if a part
failed. Missed targets are no failure: they are listed.

Written to the folder: ``report.md`` and ``report.json``, the figures (``gpu.json``, ``gpu.csv``),
and the ends of the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report, first_line, revision, tail

# --- parts ----------------------------------------------------------------------------------------


def facts(report: Report, part: Part) -> None:
    """The machine and its tools."""
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap"]
    part.end(
        OK,
        f"python {sys.version.split()[0]}, commit {revision()}",
        f"gpu: {first_line([*smi, '--format=csv,noheader'])}",
        f"nvcc: {first_line(['nvcc', '--version'])}",
        f"compute-sanitizer: {first_line(['compute-sanitizer', '--version'])}",
    )


def peers(report: Report, part: Part) -> None:
    """Other optimizers, from wheels that were carried along."""
    wheels = sorted(report.wheels.glob("*.whl"))
    if not wheels:
        part.end(NOT_RUN, f"no wheels in {report.wheels}: only optimizers that are installed")
        return
    for wheel in wheels:  # one by one: one that does not fit this Python is not all of them
        flags = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--quiet"]
        target = ["--target", str(report.site), str(wheel)]
        command = [sys.executable, "-m", "pip", "install", *flags, *target]
        installed = report.run(part, command, "build.log") == 0
        part.lines.append(f"{wheel.name}: {'installed' if installed else 'NOT installed'}")
    part.end(OK)


def build(report: Report, part: Part) -> None:
    """Both libraries, for this machine's GPU."""
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    folder = report.work / "cmake"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [*cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), *generator]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    # As torch sees the GPU: nvidia-smi, which CMake would ask, may not be there.
    ask = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    capability = "" if report.dry else first_line([sys.executable, "-c", ask])
    if capability.isdigit():
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={capability}")
    mode = "compile-only" if report.dry else "ON"
    commands = [configure]
    if not report.dry:
        jobs = str(len(os.sched_getaffinity(0)))
        commands.append([*cmake, "--build", str(folder), "--parallel", jobs])
        commands.append([*cmake, "--install", str(folder), "--prefix", str(ROOT)])
    for command in commands:
        status = report.run(part, command, "build.log", CAME8BIT_CUDA=mode)
        if status != 0:
            part.end(FAILED, f"{command[1]} gave {status}:", tail(report.out / "build.log"))
            return
    said = (report.out / "build.log").read_text(encoding="utf-8").splitlines()
    part.end(OK, *[line.removeprefix("-- ") for line in said if "came8bit: nvcc" in line])
    if report.dry:
        part.end(OK, "configured only: a dry run compiles nothing (make cuda-compile does)")


def tests(report: Report, part: Part) -> None:
    """All tests marked cuda; one that is skipped fails, because it could have run here."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.cuda" in path.read_text(encoding="utf-8")
    )
    results = report.work / "tests.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", f"--junitxml={results}", *files]
    status = report.run(part, command, "tests.log")
    if not results.exists():
        part.end(FAILED, f"pytest gave {status} and no results:", tail(report.out / "tests.log"))
        return
    cases = list(ET.parse(results).getroot().iter("testcase"))
    bad = {
        kind: [
            f"{case.get('classname')}::{case.get('name')}"
            for case in cases
            if case.find(tag) is not None
        ]
        for kind, tag in (("failed", "failure"), ("broken", "error"), ("skipped", "skipped"))
    }
    passed = len(cases) - sum(map(len, bad.values()))
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in bad.items())
    if report.dry:
        part.end(NOT_RUN if not bad["failed"] and not bad["broken"] else FAILED, "no GPU")
    else:
        part.end(OK if passed == len(cases) and status == 0 else FAILED)
    part.end(part.status, f"{passed} passed, {counts}")
    for kind, names in bad.items():
        part.lines += [f"{kind}: {name}" for name in names[:20]] if not report.dry else []


def sanitizer(tool: str) -> Callable[[Report, Part], None]:
    """A part that runs the small cases under one tool of compute-sanitizer."""

    def run(report: Report, part: Part) -> None:
        cases = [sys.executable, str(ROOT / "scripts" / "gpu_cases.py")]
        log = "sanitizer.log"
        if report.dry:
            status = report.run(part, [*cases, "--device", "cpu"], log)
            part.end(NOT_RUN if status == 0 else FAILED, "no GPU; the cases ran on the CPU")
            return
        program = shutil.which("compute-sanitizer")
        if program is None:
            part.end(NOT_RUN, "compute-sanitizer is not on this machine")
            return
        # Every allocation of its own, so that a step over its end is seen.
        flags = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        flags += ["--kernel-name", "kernel_substring=came8bit"]
        status = report.run(
            part, [program, *flags, *cases], log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        text = (report.out / log).read_text(encoding="utf-8")
        if "Device not supported" in text and status != 0:
            part.end(NOT_RUN, "compute-sanitizer does not support this machine")
        elif status == 0:
            part.end(OK, *[line for line in text.splitlines() if "SUMMARY" in line][-1:])
        else:
            part.end(FAILED, f"gave {status}:", tail(report.out / log))

    run.__doc__ = f"compute-sanitizer, {tool}, on small cases."
    return run


def benchmarks(report: Report, part: Part) -> None:
    """Time, bandwidth and memory against other optimizers."""
    # What the tests left over is theirs, too, but for what comes after them.
    left = report.deadline - time.monotonic() - 5
    part.limit = max(part.limit, left - CAPPED_SECONDS)
    seconds = min(20.0, left) if report.dry else min(part.limit, left) - 25
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), "--out", str(report.out)]
    command += ["--seconds", f"{max(10.0, seconds):.0f}"]
    command += ["--device", "cpu"] if report.dry else []
    status = report.run(part, command, "bench.log")
    path = report.out / "gpu.json"
    if status != 0 or not path.exists():
        part.end(FAILED, f"gave {status}:", tail(report.out / "bench.log"))
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    log = (report.out / "bench.log").read_text(encoding="utf-8").splitlines()
    figures = [line for line in log if " x ours" in line or line.startswith(("copy:", "    {"))]
    part.end(NOT_RUN if report.dry else OK, "no GPU; tiny cases ran on the CPU" * report.dry)
    part.lines += figures
    part.lines += [f"not run: {item['what']}: {item['why']}" for item in result["not_run"]]
    part.lines += [t["text"] for t in result["targets"]]


def capped(report: Report, part: Part) -> None:
    """A 7B-shaped Llama under a cap on memory, in the time that is left."""
    left = part.limit = max(part.limit, report.deadline - time.monotonic() - 5)
    folder = report.work / "capped"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_capped.py"), "--out", str(folder)]
    command += ["--seconds", f"{max(10.0, left - 15):.0f}"]
    command += ["--device", "cpu", "--rehearse", "--steps", "2"] if report.dry else []
    status = report.run(part, command, "bench.log")
    path = folder / "capped.json"
    if not path.exists():
        part.end(FAILED, f"gave {status}:", tail(report.out / "bench.log"))
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    figures = report.out / "gpu.json"
    others = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    figures.write_text(json.dumps({**others, "capped": result}, indent=1) + "\n", encoding="utf-8")
    part.end(FAILED if status != 0 else NOT_RUN if report.dry else OK)
    part.lines += ["no GPU; tiny shapes ran on the CPU"] * report.dry
    part.lines += [t["text"] for t in result["targets"]]
    part.lines += [f"not run: {item['what']}: {item['why']}" for item in result["not_run"]]


CAPPED_SECONDS = 150
"""What the benchmarks leave to the last part, beyond their own limit."""

PARTS: tuple[tuple[str, float, Callable[[Report, Part], None]], ...] = (
    ("facts", 10, facts),
    ("peers", 20, peers),
    ("build", 120, build),
    ("tests", 150, tests),
    ("memcheck", 60, sanitizer("memcheck")),
    ("racecheck", 60, sanitizer("racecheck")),
    ("benchmarks", 150, benchmarks),
    ("capped", 30, capped),
)
"""Name, seconds that it may take, function. Together they stay within ten minutes.

The last two take what others leave, and say what they have left out. Once the libraries are built,
``--parts peers,capped`` gives the last one three minutes of its own.
"""


# --- the report -----------------------------------------------------------------------------------


def text_of(report: Report) -> str:
    """The report for reading."""
    title = "GPU report" + (" (dry run without a GPU)" if report.dry else "")
    lines = [f"# {title}", ""]
    lines += ["| part | | seconds | of at most |", "|---|---|---|---|"]
    for part in report.parts:
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | {part.limit:.0f} |")
    for part in report.parts:
        lines += ["", f"## {part.name}: {part.status}", "", "```", *part.lines, "```"]
    return "\n".join(lines) + "\n"


def write(report: Report) -> None:
    """Write what is known so far: a run that is stopped leaves that."""
    parts = [vars(part) for part in report.parts]
    content: dict[str, Any] = {"dry_run": report.dry, "git": revision(), "parts": parts}
    (report.out / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (report.out / "report.md").write_text(text_of(report), encoding="utf-8")


def warm_up(report: Report) -> subprocess.Popen[bytes] | None:
    """Have adafactor8bit compile its kernels meanwhile: it does so at its first step."""
    if report.dry:
        return None
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import torch, bench_gpu_peers as b;"
        "p = torch.nn.Parameter(torch.ones(64, 64, device='cuda')); p.grad = torch.ones_like(p);"
        "b.OPTIMIZERS['adafactor8bit CAME'].make([p]).step()"
    )
    environment = {**report.environment(), "CAME8BIT_REQUIRE_KERNELS": "0"}
    environment["CAME8BIT_DISABLE_KERNELS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run all parts or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="of other optimizers")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-report")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--parts", help=f"of {', '.join(name for name, *_ in PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="try the plumbing without a GPU")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",") if options.parts else [name for name, *_ in PARTS]
    unknown = set(chosen) - {name for name, *_ in PARTS}
    if unknown:
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, see --help")
    report = Report(
        out=options.out.resolve(),
        dry=options.dry_run,
        deadline=time.monotonic() + options.budget,
        wheels=options.wheels.resolve(),
        work=options.work.resolve(),
    )
    shutil.rmtree(report.work, ignore_errors=True)
    report.work.mkdir(parents=True)
    report.out.mkdir(parents=True, exist_ok=True)
    warming = None
    for name, limit, function in PARTS:
        if name not in chosen:
            continue
        part = Part(name, limit)
        report.parts.append(part)
        print(f"{name}: {(function.__doc__ or '').splitlines()[0]}", flush=True)
        try:
            if report.deadline - time.monotonic() < 5:
                part.end(NOT_RUN, "out of time")
            else:
                function(report, part)
        except Exception as error:
            part.end(FAILED, f"{type(error).__name__}: {error}")
        if name == "peers":
            warming = warm_up(report)
        print(f"  {part.status} after {part.seconds:.0f} s", flush=True)
        write(report)
    if warming is not None and warming.poll() is None:
        warming.kill()
    print(text_of(report))
    return int(any(part.status == FAILED for part in report.parts))


if __name__ == "__main__":
    sys.exit(main())
