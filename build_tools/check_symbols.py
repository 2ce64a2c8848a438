"""Check what the compiled libraries export, need and contain.

1. They export the C functions that ``came8bit/ops/libraries.py`` call, and nothing else.
2. They use no C++ symbol of torch: the stable ABI is plain C, and only that lasts across versions.
3. They bake in no folder and need no library that torch does not bring along; the CUDA runtime is
   inside.
4. Code for one instruction set stays in its own files: a function that the compiler emitted out of
   line there could be linked into the others, and crash on a CPU without those instructions.
5. No multiply-add is fused anywhere: that would change the results.
6. The CUDA library cannot be opened where there is no libtorch_cuda; where something stands in for
   it, every operator has a CUDA kernel.

    python build_tools/check_symbols.py                        the CPU library
    python build_tools/check_symbols.py --cuda build           the CUDA library in the folder build

Needs nm, readelf and objdump (binutils), which come with a C++ compiler on Linux. The CUDA library
is one that was made with CAME8BIT_CUDA=compile-only: no GPU is needed, and any build of torch will
do.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from came8bit.ops import libraries

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {
    "_C_cpu": {"came8bit_cpu_best_isa", "came8bit_cpu_isa", "came8bit_cpu_set_isa"},
    "_C_cuda": {"came8bit_cuda_architectures", "came8bit_cuda_nvcc"},
}
MAY_NEED = re.compile(
    r"lib(torch_cpu|torch_cuda|stdc\+\+|gcc_s|m|c|rt|dl|pthread)\.so(\.\d+)?|ld-linux.*"
)
MUST_NEED = {"_C_cpu": {"libtorch_cpu.so"}, "_C_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"}}
TORCH_CXX = re.compile(r"\b(at|c10|torch|caffe2)::")
ISA_OBJECTS = ("avx2", "avx512")
FUSED = re.compile(r"\t(vfn?m(add|sub)\w*|fn?m(add|sub)|fml[as])\b")
# Opens the CUDA library alone, which has to fail, then with the stub that it was linked against.
OPEN_CUDA = """
import ctypes, sys
import torch
from came8bit.ops import schema
assert torch.version.cuda is None, "run this with a CPU build of torch"
library, stub = sys.argv[1:]
try:
    torch.ops.load_library(library)
    sys.exit("could be opened without libtorch_cuda.so")
except OSError:
    pass
ctypes.CDLL(stub)
torch.ops.load_library(library)
names = "factored_step_ unfactored_step_ quantize_blockwise dequantize_blockwise".split()
without = [
    name for name in names
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"came8bit::{name}", "CUDA")
]
if without:
    sys.exit(f"has no kernel for {', '.join(without)}")
"""
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
    expected = EXPORTS[library.stem]
    if exported != expected:
        problems.append(f"exports {sorted(exported)}, expected {sorted(expected)}")
    undefined = run("nm", "-D", "-C", "--undefined-only", library).splitlines()
    problems += [f"needs {line.strip()}" for line in undefined if TORCH_CXX.search(line)]
    missing = MUST_NEED[library.stem]
    for line in run("readelf", "-d", library).splitlines():
        if "(RPATH)" in line or "(RUNPATH)" in line:
            problems.append(f"bakes in a folder: {line.strip()}")
        needed = re.search(r"\(NEEDED\).*\[(.+)\]", line)
        if needed and not MAY_NEED.fullmatch(needed[1]):
            problems.append(f"needs {needed[1]}")
        if needed:
            missing = missing - {needed[1]}
    return problems + [f"does not say that it needs {name}" for name in sorted(missing)]


def cuda_problems(build: Path) -> list[str]:
    """Return what is wrong with the CUDA library in the folder ``build``."""
    library, stub = build / "_C_cuda.so", build / "stub" / "libtorch_cuda.so"
    problems = library_problems(library)
    text = library.read_bytes()
    problems += [f"names the folder {ROOT}"] * (str(ROOT).encode() in text)
    if torch.version.cuda is None:
        done = subprocess.run(
            [sys.executable, "-c", OPEN_CUDA, str(library), str(stub)],
            capture_output=True,
            text=True,
            check=False,
        )
        problems += [done.stderr.strip()] * (done.returncode != 0)
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


def cpu_problems(library: Path) -> list[str]:
    """Return what is wrong with the installed library and with a build made for the purpose."""
    problems = library_problems(library)
    with tempfile.TemporaryDirectory() as build:
        cmake = ("cmake", "-S", ROOT / "csrc", "-B", build, f"-DPython_EXECUTABLE={sys.executable}")
        run(*cmake, "-DCAME8BIT_CUDA=OFF")
        run("cmake", "--build", build, "--parallel", "2")
        return problems + object_problems(Path(build))


def main(arguments: list[str] | None = None) -> int:
    """Check one library."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cuda", type=Path, metavar="BUILD", help="the CUDA library in that folder"
    )
    options = parser.parse_args(arguments)
    if options.cuda:
        path = options.cuda / "_C_cuda.so"
        problems = cuda_problems(options.cuda)
    else:
        status = libraries.status().cpu
        if status.path is None:
            print(f"no library to check: {status.reason}", file=sys.stderr)
            return 1
        path = Path(status.path)
        problems = cpu_problems(path)
    for problem in problems:
        print(f"{path}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{path}: exports, dependencies and code are as they should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
