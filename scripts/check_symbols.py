"""Check what the compiled CPU library exports, needs and contains.

1. It exports the C functions that ``came8bit/_kernels.py`` calls, and nothing else.
2. It uses no C++ symbol of torch: the stable ABI is plain C, and only that lasts across versions.
3. It bakes in no folder and needs no library that torch does not bring along.
4. Code for one instruction set stays in its own files: a function that the compiler emitted out of
   line there could be linked into the others, and crash on a CPU without those instructions.
5. No multiply-add is fused anywhere: that would change the results.

Needs nm, readelf and objdump (binutils), which come with a C++ compiler on Linux.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from came8bit import _kernels

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {"came8bit_cpu_best_isa", "came8bit_cpu_isa", "came8bit_cpu_set_isa"}
MAY_NEED = re.compile(r"lib(torch_cpu|stdc\+\+|gcc_s|m|c|pthread)\.so(\.\d+)?|ld-linux.*")
TORCH_CXX = re.compile(r"\b(at|c10|torch|caffe2)::")
ISA_OBJECTS = ("kernels_avx2", "kernels_avx512")
FUSED = re.compile(r"\t(vfn?m(add|sub)\w*|fn?m(add|sub)|fml[as])\b")
VEX = re.compile(r"%[yz]mm\d|\tv[a-z0-9]+\s.*%xmm")


def run(*command: str | Path) -> str:
    """Return what ``command`` prints; its failure is ours."""
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def library_problems(library: Path) -> list[str]:
    """Return what is wrong with the symbols and the dependencies of ``library``."""
    problems = []
    exported = set(run("nm", "-D", "--defined-only", "--format=posix", library).split("\n"))
    exported = {line.split()[0] for line in exported if line}
    if exported != EXPORTS:
        problems.append(f"exports {sorted(exported)}, expected {sorted(EXPORTS)}")
    undefined = run("nm", "-D", "-C", "--undefined-only", library).splitlines()
    problems += [f"needs {line.strip()}" for line in undefined if TORCH_CXX.search(line)]
    for line in run("readelf", "-d", library).splitlines():
        if "(RPATH)" in line or "(RUNPATH)" in line:
            problems.append(f"bakes in a folder: {line.strip()}")
        needed = re.search(r"\(NEEDED\).*\[(.+)\]", line)
        if needed and not MAY_NEED.fullmatch(needed[1]):
            problems.append(f"needs {needed[1]}")
    return problems


def object_problems(folder: Path) -> list[str]:
    """Return what is wrong with the machine code of the object files in ``folder``."""
    objects = sorted(folder.rglob("*.o"))
    if not objects:
        return [f"no object files in {folder}"]
    problems = []
    for path in objects:
        name = path.name.split(".")[0]
        code = run("objdump", "-d", "--no-show-raw-insn", path)
        if found := FUSED.search(code):
            problems.append(f"{name}: fused multiply-add {found[1]}")
        if platform.machine() not in ("x86_64", "AMD64"):
            continue
        if name in ISA_OBJECTS:
            for line in run("nm", "-C", "--defined-only", path).splitlines():
                if re.match(r"[0-9a-f]* [WVu] (?!DW\.ref\.)", line):
                    problems.append(f"{name}: shared out-of-line function {line[19:]}")
        elif found := VEX.search(code):
            problems.append(f"{name}: AVX in a file that every CPU runs: {found[0].strip()}")
    return problems


def main() -> int:
    """Check the installed library, and the object files of a build made for the purpose."""
    path = _kernels.status().cpu.path
    if path is None:
        print(f"no library to check: {_kernels.status().cpu.reason}", file=sys.stderr)
        return 1
    problems = library_problems(Path(path))
    with tempfile.TemporaryDirectory() as build:
        run("cmake", "-S", ROOT / "csrc", "-B", build, f"-DPython_EXECUTABLE={sys.executable}")
        run("cmake", "--build", build, "--parallel", "2")
        problems += object_problems(Path(build))
    for problem in problems:
        print(f"{Path(path).name}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{path}: exports, dependencies and machine code are as they should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
