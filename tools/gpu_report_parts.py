"""Parts of the GPU report: facts, libraries, other optimizers, sanitizer, benchmarks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report, first_line, revision

LIBRARIES = ("_C_cpu.so", "_C_cuda.so")
SANITIZER = "compute-sanitizer"
CUDA = Path("/usr/local")
SHOWN = re.compile("    |copy:|not run:|holds|MISSED|.* x ours|.* tokens/s")
"""Lines of a benchmark's log that the report shows."""


def facts(report: Report, part: Part) -> None:
    """Report the machine and its tools."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
    found = find_sanitizer()
    part.end(
        OK,
        f"python {sys.version.split()[0]}, commit {revision()}",
        f"{len(os.sched_getaffinity(0))} processors",
        ", ".join(f"{name} {value}" for name, value in report.gpu.items()),
        f"gpu: {first_line('nvidia-smi', query, '--format=csv,noheader')}",
        f"nvcc: {first_line('nvcc', '--version')}",
        f"{SANITIZER}: {first_line(found, '--version') if found else 'none'}",
    )
    if not report.dry and "capability" not in report.gpu:
        part.end(FAILED, "torch sees no GPU")


# --- libraries ------------------------------------------------------------------------------------


def stamp(capability: str) -> dict[str, str]:
    """Return what the libraries depend on; not on torch, whose stable ABI they use."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {"sources": digest.hexdigest(), "capability": capability}


def kept(folder: Path, wanted: dict[str, str]) -> bool:
    """Return whether ``folder`` has libraries that were built from these sources for this GPU."""
    try:
        built = json.loads((folder / "built.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return built == wanted and all((folder / "came8bit" / name).exists() for name in LIBRARIES)


def install(folder: Path) -> None:
    """Put the libraries next to the Python files."""
    for name in LIBRARIES:
        new = ROOT / "came8bit" / f".{name}.new"
        shutil.copyfile(folder / "came8bit" / name, new)
        new.replace(ROOT / "came8bit" / name)


def build(report: Report, part: Part) -> None:
    """Both libraries, for this machine's GPU."""
    # As torch sees the GPU: nvidia-smi, which CMake would ask, may not be there.
    capability = report.build_for or ("" if report.dry else report.gpu.get("capability", ""))
    capability = capability.replace(".", "")
    wanted, folder = stamp(capability), report.work / "libraries"
    if report.keep and not report.dry and kept(folder, wanted):
        install(folder)
        check = "import came8bit; print(came8bit.kernel_status().cuda)"
        if report.run(part, sys.executable, "-c", check) == 0:
            part.end(OK, f"kept: built before from these sources, for sm_{capability}")
            return
        part.lines.append("what was kept cannot be loaded here; built anew")
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    tree = report.work / "cmake"
    configure = ["-S", ROOT / "csrc", "-B", tree, f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={capability}"] if capability else []
    steps: list[list[object]] = [configure]
    if not report.dry:
        jobs = str(len(os.sched_getaffinity(0)))
        steps += [["--build", tree, "--parallel", jobs], ["--install", tree, "--prefix", folder]]
    mode = "compile-only" if report.dry else "release" if report.build_for else "ON"
    for step in steps:
        # -lineinfo: the sanitizer then names lines; the code stays the same.
        status = report.run(part, *cmake, *step, CAME8BIT_CUDA=mode, CUDAFLAGS="-lineinfo")
        if status != 0:
            errors = [line for line in report.text(part).splitlines() if "error" in line]
            part.end(FAILED, f"cmake {step[0]} gave {status}:", *errors[:20], report.tail(part, 30))
            return
    said = report.text(part).splitlines()
    part.end(OK, *[line.removeprefix("-- ") for line in said if "came8bit: nvcc" in line])
    if report.dry:
        part.end(OK, "configured only: a dry run compiles nothing (make cuda-compile does)")
        return
    (folder / "built.json").write_text(json.dumps(wanted), encoding="utf-8")
    if report.build_for:
        part.end(OK, f"to carry: {folder}")
    else:
        install(folder)


# --- other optimizers, the sanitizer --------------------------------------------------------------


def peers(report: Report, part: Part) -> None:
    """Other optimizers, from wheels that were carried along."""
    if report.dry:
        part.end(NOT_RUN, "only optimizers that are installed")
        return
    report.peers.join(part.left())
    part.end(OK, *report.peers.lines)
    if report.peers.is_alive():
        part.lines.append("still compiling, beside the next parts")


def find_sanitizer() -> str:
    """Return the program or '': on the path, in a CUDA toolkit, in PyPI's packages."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += [path.parent.parent for path in (Path(nvcc), Path(nvcc).resolve())] if nvcc else []
    roots += sorted(CUDA.glob("cuda*"), reverse=True)
    roots += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*"), reverse=True)
    roots += sorted(Path(sysconfig.get_path("platlib")).glob("nvidia/*"), reverse=True)
    inside = ("bin", SANITIZER, f"extras/{SANITIZER}")
    folders = [str(root / folder) for root in roots for folder in inside]
    return shutil.which(SANITIZER, path=os.pathsep.join([os.environ["PATH"], *folders])) or ""


def sanitizer(tool: str) -> Callable[[Report, Part], None]:
    """Return a part that runs the small cases under one tool of compute-sanitizer."""

    def run(report: Report, part: Part) -> None:
        cases = [sys.executable, ROOT / "tools" / "sanitizer_cases.py"]
        if report.dry:
            status = report.run(part, *cases, "--device", "cpu")
            part.end(NOT_RUN if status == 0 else FAILED, "no GPU; the cases ran on the CPU")
            part.lines += [] if status == 0 else [report.tail(part)]
            return
        program = find_sanitizer()
        if not program:
            part.end(NOT_RUN, f"{SANITIZER} is not on this machine: {tool} did NOT run")
            return
        flags = ["--tool", tool, "--error-exitcode", 9, "--print-limit", 20]
        # torch itself asks for things that fail, and goes on: that is not an error of ours.
        flags += ["--report-api-errors", "no", "--kernel-name", "kernel_substring=came8bit"]
        # Every allocation of its own, so that a step over its end is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status = report.run(part, program, *flags, *cases, **alone)
        said = report.text(part).splitlines()
        complaints = [line for line in said if line.startswith("========= ")]
        complaints = [
            line for line in complaints if "COMPUTE-SANITIZER" not in line and "SUMMARY" not in line
        ][:60]
        if status != 0 and any("Device not supported" in line for line in said):
            part.end(NOT_RUN, f"{SANITIZER} does not support this machine: {tool} did NOT run")
        elif status == 0:
            part.end(OK, *[line for line in said if "SUMMARY" in line][-1:])
        elif status is None:
            part.end(FAILED, "out of time", *complaints or ["nothing was found up to here"])
        else:
            part.end(FAILED, f"gave {status}:", *complaints, report.tail(part))
        part.lines += [line for line in said if line.startswith("case ")][-1:]

    run.__doc__ = f"{SANITIZER}, {tool}, on small cases."
    return run


# --- benchmarks -----------------------------------------------------------------------------------


def measure(report: Report, part: Part, module: str, *options: object) -> None:
    """Run a benchmark, which writes each figure as it finds it; show what its log says."""
    # It is to end by itself; what it is stopped in is all that is lost.
    seconds = min(part.left(), 90.0 if report.dry else math.inf) - 10
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", report.out]
    command += ["--seconds", f"{max(5.0, seconds):.0f}"]
    status = report.run(part, *command, *["--device", "cpu"] * report.dry)
    if status == 0:
        part.end(NOT_RUN if report.dry else OK, "no GPU; tiny cases on the CPU" * report.dry)
    else:
        part.end(FAILED, f"gave {status}, what was measured before is kept:", report.tail(part))
    part.lines += filter(SHOWN.match, report.text(part).splitlines())


def step_times(piece: str) -> Callable[[Report, Part], None]:
    """Return a part that runs one piece of the benchmark of steps."""

    def run(report: Report, part: Part) -> None:
        if piece == "others" and report.peers.is_alive():  # one of them may still be compiled
            report.peers.join(part.left() / 2)
        measure(report, part, "gpu_step", "--pieces", piece, "--add")

    run.__doc__ = {
        "benchmarks": "Time, bandwidth and memory against bitsandbytes and fused AdamW.",
        "scans": "Kernels one by one, and what the variables of the environment change.",
        "others": "CAME8bit against the slower optimizers.",
    }[piece]
    return run


def capped(report: Report, part: Part) -> None:
    """Train a 7B-shaped Llama under a cap on memory."""
    measure(report, part, "memory_cap", *["--rehearse", "--steps", "2"] * report.dry)
