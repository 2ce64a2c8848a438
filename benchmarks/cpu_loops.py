"""Count the instructions of the CPU kernels' inner loops, and the cycles that a model gives them.

    python -m benchmarks.cpu_loops                                      # AVX2 on Zen 3
    python -m benchmarks.cpu_loops --isa avx512 --cpu znver4 --cpu sapphirerapids

Needs GCC or Clang and llvm-mca (``--mca llvm-mca-19`` if that is its name); old ones do not know
new processors. Compiles a table of kernels to assembly, a minute or two, and prints for each
innermost loop over elements: all instructions, vector instructions, by how many bytes its pointers
move, and cycles per iteration of each processor with data in the first-level cache. Pointers move
by 64 bytes of fp32 and 32 of bf16 for 16 elements; loops over tiles do four rows of them at once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu" / "isa"
# As in csrc/CMakeLists.txt.
_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
_ISA_FLAGS = {
    "avx2": "-mavx2 -mf16c",
    "avx512": "-mavx2 -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
_ITERATIONS = 200
_SMALLEST = 7  # vector instructions; shorter loops are tails

Loop = list[str]


def assembly(isa: str) -> list[str]:
    """Return the lines of the assembly of an instruction set's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.s"
        compiler = [os.environ.get("CXX", "c++"), *_FLAGS.split(), *_ISA_FLAGS[isa].split()]
        define = f"-DCAME8BIT_HAVE_{isa.upper()}"
        subprocess.run([*compiler, define, "-S", SOURCES / f"{isa}.cpp", "-o", made], check=True)
        return made.read_text(encoding="utf-8").splitlines()


def functions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield name and lines of each function."""
    starts = [i for i, line in enumerate(lines) if re.match(r"_Z\w+:", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].partition(":")[0], lines[start + 1 : end]


def innermost_loops(lines: list[str]) -> Iterator[Loop]:
    """Yield the instructions of each jump back to a label that has no other loop inside."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    jumps = ((i, re.match(r"\s+j\w+\s+(\.L\w+)", line)) for i, line in enumerate(lines))
    spans = [(labels[m[1]], i) for i, m in jumps if m and labels.get(m[1], i) < i]
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            yield [line for line in lines[first : last + 1] if re.match(r"\s+[a-z]", line)]


def vector_instructions(loop: Loop) -> int:
    """Return how many instructions work on vectors: their names begin with v."""
    return sum(line.lstrip().startswith("v") for line in loop)


def moves(loop: Loop) -> list[int]:
    """Return by how many bytes the loop moves its pointers."""
    found = (re.match(r"\s+(add|sub)q\s+\$(-?\d+), %r", line) for line in loop)
    return sorted({abs(int(m[2])) for m in found if m})


def cycles(loop: Loop, cpu: str, mca: str) -> float:
    """Return the cycles per iteration that llvm-mca finds for ``cpu``.

    Raises:
        RuntimeError: it does not know an instruction, or failed otherwise.
    """
    body = "\n".join(line for line in loop if not re.match(r"\s+j", line))
    command = [mca, f"-mcpu={cpu}", f"-iterations={_ITERATIONS}"]
    told = subprocess.run(command, input=body, capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", told.stdout)
    if total is None:
        raise RuntimeError(f"{' '.join(command)} failed: {told.stderr[:300]}")
    return int(total[1]) / _ITERATIONS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", choices=sorted(_ISA_FLAGS), default="avx2")
    parser.add_argument("--cpu", action="append", help="as llvm-mca calls it (default: znver3)")
    parser.add_argument("--mca", default="llvm-mca", help="the program (default: llvm-mca)")
    arguments = parser.parse_args()
    cpus = arguments.cpu or ["znver3"]
    found = [
        (name, loop)
        for name, lines in functions(assembly(arguments.isa))
        for loop in innermost_loops(lines)
        if moves(loop) and vector_instructions(loop) >= _SMALLEST
    ]
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, _ in found), capture_output=True, text=True
    ).stdout.splitlines()
    print("instructions, vector ones, moves, cycles:", *cpus)
    for name, (_, loop) in zip(names, found, strict=True):
        times = "  ".join(f"{cycles(loop, cpu, arguments.mca):6.1f}" for cpu in cpus)
        short = name.replace("(anonymous namespace)::", "").partition("(")[0].split("::", 2)[-1]
        print(
            f"{len(loop):4d} {vector_instructions(loop):4d}  {moves(loop)!s:14}  {times}  {short}"
        )


if __name__ == "__main__":
    main()
