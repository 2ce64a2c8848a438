"""Parts of the GPU report before the tests: facts, the libraries, other optimizers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from gpu_report_run import FAILED, NOT_RUN, OK, ROOT, Part, Report, first_line, revision
from gpu_report_sanitizer import find_sanitizer

LIBRARIES = ("_C_cpu.so", "_C_cuda.so")


def facts(report: Report, part: Part) -> None:
    """The machine and its tools."""
    smi = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem",
    ]
    sanitizer = find_sanitizer()
    part.end(
        OK,
        f"python {sys.version.split()[0]}, commit {revision()}",
        f"{len(os.sched_getaffinity(0))} processors",
        ", ".join(f"{name} {value}" for name, value in report.gpu.items()),
        f"gpu: {first_line([*smi, '--format=csv,noheader'])}",
        f"nvcc: {first_line(['nvcc', '--version'])}",
        f"compute-sanitizer: {first_line([sanitizer, '--version']) if sanitizer else 'none'}",
    )
    if not report.dry and "capability" not in report.gpu:
        part.end(FAILED, "torch sees no GPU")


# --- libraries ------------------------------------------------------------------------------------


def stamp(capability: str) -> dict[str, str]:
    """What the libraries depend on; not on torch, whose stable ABI they use."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {"sources": digest.hexdigest(), "capability": capability}


def kept(folder: Path, wanted: dict[str, str]) -> bool:
    """Whether ``folder`` has libraries that were built from these sources for this GPU."""
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
        check = [sys.executable, "-c", "import came8bit; print(came8bit.kernel_status().cuda)"]
        if report.run(part, check, "build.log") == 0:
            part.end(OK, f"kept: built before from these sources, for sm_{capability}")
            return
        part.lines.append("what was kept cannot be loaded here; built anew")
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    tree = report.work / "cmake"
    configure = [*cmake, "-S", str(ROOT / "csrc"), "-B", str(tree)]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    if capability:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={capability}")
    commands = {"to configure": configure}
    if not report.dry:
        jobs = str(len(os.sched_getaffinity(0)))
        commands["to compile"] = [*cmake, "--build", str(tree), "--parallel", jobs]
        commands["to install"] = [*cmake, "--install", str(tree), "--prefix", str(folder)]
    mode = "compile-only" if report.dry else "release" if report.build_for else "ON"
    # The sanitizer then names lines; the code stays the same.
    variables = {"CAME8BIT_CUDA": mode, "CUDAFLAGS": "-lineinfo"}
    for what, command in commands.items():
        status = report.run(part, command, "build.log", **variables)
        if status != 0:
            errors = [line for line in report.text("build.log").splitlines() if "error" in line]
            part.end(FAILED, f"{what} gave {status}:", *errors[:20], report.tail("build.log", 30))
            return
    said = report.text("build.log").splitlines()
    part.end(OK, *[line.removeprefix("-- ") for line in said if "came8bit: nvcc" in line])
    if report.dry:
        part.end(OK, "configured only: a dry run compiles nothing (make cuda-compile does)")
        return
    (folder / "built.json").write_text(json.dumps(wanted), encoding="utf-8")
    if report.build_for:
        part.end(OK, f"to carry: {folder}")
    else:
        install(folder)


# --- other optimizers -----------------------------------------------------------------------------


def start_peers(report: Report) -> None:
    """Begin to unpack the wheels, beside the build; what compiles kernels does so at once, too."""
    if report.dry or report.build_for:
        return
    script = str(ROOT / "tools" / "gpu_report_peers.py")
    command = [sys.executable, script, str(report.wheels), str(report.site)]
    # It must not be seen on the GPU: tests look at free memory, the benchmark at times.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    report.installing = report.start(command, "peers.log", **hidden)


def wait_for_wheels(report: Report, part: Part) -> None:
    """Return when they are unpacked, but not necessarily compiled: tests need some of them."""
    wait_for(report, "unpacked", min(60.0, report.left(part)))


def wait_for(report: Report, said: str, seconds: float) -> None:
    """Wait until the program that unpacks has ``said`` something, or ends."""
    end = time.monotonic() + seconds
    while report.installing is not None and report.installing.alive and time.monotonic() < end:
        if said in report.text("peers.log"):
            return
        time.sleep(0.2)


def peers(report: Report, part: Part) -> None:
    """Other optimizers, from wheels that were carried along."""
    if report.installing is None:
        part.end(NOT_RUN, "only optimizers that are installed")
        return
    wait_for(report, "all done", report.left(part))
    part.end(OK)
    if report.installing.alive:
        part.lines.append("still compiling, beside the next parts")
    elif (status := report.installing.wait(0)) != 0:
        part.end(FAILED, f"gave {status}:", report.tail("peers.log"))
    said = report.text("peers.log").splitlines()
    part.lines += [line.removeprefix("-- ") for line in said if line.startswith("-- ")]
