"""Parts of the GPU report: small cases under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report

NAME = "compute-sanitizer"
CUDA = Path("/usr/local")
FOUND = 9
"""Its exit status if it found something."""


def candidates() -> Iterator[Path]:
    """Where it may be: on the path, in a CUDA toolkit, in what PyPI's packages unpack."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        roots += [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
    roots += sorted(CUDA.glob("cuda*"), reverse=True)
    for scheme in ("purelib", "platlib"):
        roots += sorted(Path(sysconfig.get_path(scheme)).glob("nvidia/*"), reverse=True)
    on_path = shutil.which(NAME)
    if on_path:
        yield Path(on_path)
    for root in roots:
        for folder in ("bin", NAME, f"extras/{NAME}"):
            yield root / folder / NAME


def find_sanitizer() -> str:
    """The program, or ''."""
    usable = (str(path) for path in candidates() if path.is_file() and os.access(path, os.X_OK))
    return next(usable, "")


def flags(program: str, tool: str) -> list[str]:
    """Its options, without those that this version does not know: they would be an error."""
    wanted = [
        ["--tool", tool],
        ["--error-exitcode", str(FOUND)],
        ["--print-limit", "20"],
        # torch itself asks for things that fail, and goes on: that is no error of ours.
        ["--report-api-errors", "no"],
        ["--kernel-name", "kernel_substring=came8bit"],
    ]
    try:
        done = subprocess.run(
            [program, "--help"], capture_output=True, text=True, timeout=30, check=False
        )
        known = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired):
        known = ""
    if "--tool" not in known:  # a help that cannot be read says nothing
        return [word for option in wanted for word in option]
    return [word for option in wanted if option[0] in known for word in option]


def sanitizer(tool: str) -> Callable[[Report, Part], None]:
    """A part that runs the small cases under one tool of compute-sanitizer."""

    def run(report: Report, part: Part) -> None:
        cases = [sys.executable, str(ROOT / "tools" / "sanitizer_cases.py")]
        log = f"{tool}.log"
        if report.dry:
            status = report.run(part, [*cases, "--device", "cpu"], log)
            part.end(NOT_RUN if status == 0 else FAILED, "no GPU; the cases ran on the CPU")
            part.lines += [] if status == 0 else [report.tail(log)]
            return
        program = find_sanitizer()
        if not program:
            part.end(NOT_RUN, f"{NAME} is not on this machine: {tool} did NOT run")
            return
        # Every allocation of its own, so that a step over its end is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status = report.run(part, [program, *flags(program, tool), *cases], log, **alone)
        text = report.text(log)
        reached = [line for line in text.splitlines() if line.startswith("case ")]
        if "Device not supported" in text and status != 0:
            part.end(NOT_RUN, f"{NAME} does not support this machine: {tool} did NOT run")
        elif status == 0:
            part.end(OK, *[line for line in text.splitlines() if "SUMMARY" in line][-1:])
        elif status is None:
            found = complaints(text)
            part.end(FAILED, "out of time", *found or ["nothing was found up to here"])
        else:
            part.end(FAILED, f"gave {status}:", *complaints(text), report.tail(log))
        part.lines += reached[-1:]

    run.__doc__ = f"compute-sanitizer, {tool}, on small cases."
    return run


def complaints(text: str) -> list[str]:
    """The first lines with which it complains."""
    said = [line for line in text.splitlines() if line.startswith("========= ")]
    return [line for line in said if "COMPUTE-SANITIZER" not in line and "SUMMARY" not in line][:60]
