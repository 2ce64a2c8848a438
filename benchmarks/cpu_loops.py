"""Count the instructions of the CPU kernels' inner loops, and the cycles that a model gives them.

    python -m benchmarks.cpu_loops                                      # AVX2 on Zen 3
    python -m benchmarks.cpu_loops --isa avx512 --cpu znver4 --cpu sapphirerapids
    python -m benchmarks.cpu_loops --table                              # sums of whole steps

Needs GCC or Clang and llvm-mca (``--mca llvm-mca-19`` if that is its name); old ones do not know
new processors. Compiles a table of kernels to assembly, a minute or two, and prints for each
innermost loop over elements: all instructions, vector instructions, by how many bytes its pointers
move, and cycles per iteration of each processor with data in the first-level cache. Pointers move
by 64 bytes of fp32 and 32 of bf16 for 16 elements; loops over tiles do four rows of them at once.

``--table`` adds up the loops of whole steps instead, per element. ``_step`` names them by what has
been inlined there, as the debugger would show it; of loops that fit it takes the shortest, because
tails and rare cases are longer. 4 and 2 bits are left out: GCC mixes their loops with what
surrounds them. Needs binutils besides.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu" / "isa"
# As in csrc/CMakeLists.txt.
_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -g1"
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


def functions(lines: list[str]) -> Iterator[tuple[str, range]]:
    """Yield name and line numbers of each function."""
    starts = [i for i, line in enumerate(lines) if re.match(r"_Z\w+:", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].partition(":")[0], range(start + 1, end)


def innermost_loops(lines: list[str], function: range) -> Iterator[list[int]]:
    """Yield the instructions of each jump back to a label that has no other loop inside.

    Instructions are line numbers.
    """
    labels = {m[1]: i for i in function if (m := re.match(r"(\.L\w+):", lines[i]))}
    jumps = ((i, re.match(r"\s+j\w+\s+(\.L\w+)", lines[i])) for i in function)
    spans = [(labels[m[1]], i) for i, m in jumps if m and labels.get(m[1], i) < i]
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            yield instructions(lines, range(first, last + 1))


def instructions(lines: list[str], span: range) -> list[int]:
    """Return which lines of a span are instructions."""
    return [i for i in span if re.match(r"\s+[a-z]", lines[i])]


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


def short_names(names: list[str]) -> list[str]:
    """Return what C++ calls functions, without their namespaces and arguments."""
    told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return [short_name(line) for line in told.stdout.splitlines()]


def short_name(name: str) -> str:
    """Drop namespaces, arguments and the type that is returned."""
    name = re.sub(r"\(anonymous namespace\)::|came8bit::|avx2::|avx512::", "", name)
    return re.sub(r"^(void|F|I|M) ", "", name.partition("(")[0])


def inlined(lines: list[str]) -> dict[int, set[str]]:
    """Return for each instruction the functions that it stands in, inlined ones included."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernels.s", Path(folder) / "kernels.o"
        numbered = {i: f"came.{i}:\n" for i in instructions(lines, range(len(lines)))}
        text = "\n".join(numbered.get(i, "") + line for i, line in enumerate(lines)) + "\n"
        source.write_text(text, encoding="utf-8")
        compiler = [os.environ.get("CXX", "c++"), "-c", str(source), "-o", str(made)]
        subprocess.run(compiler, check=True)
        told = subprocess.run(["nm", made], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^(\w+) t came\.(\d+)$", told, re.M)
        subprocess.run(["strip", "-wN", "came.*", made], check=True)  # else taken for functions
        command = ["addr2line", "-fiaC", "-e", str(made)]
        asked = "\n".join(address for address, _ in found)
        told = subprocess.run(command, input=asked, capture_output=True, text=True).stdout
    stacks = re.split(r"^0x\w+\n", told, flags=re.M)[1:]
    return {
        int(line): {short_name(name) for name in stack.splitlines()[::2]}
        for (_, line), stack in zip(found, stacks, strict=True)
    }


@dataclass(frozen=True)
class Pass:
    """A pass of a step: the loop of ``function`` in which all of ``inside`` are inlined.

    ``elements`` are those of an iteration, ``rows`` of how many rows. Where ``loops`` are several,
    they run one after the other. ``outside``: the code outside of loops instead.
    """

    name: str
    function: str
    inside: tuple[str, ...]
    lacks: tuple[str, ...] = ("_short_rows", "copy_part", "store_part")
    elements: float = 16
    rows: int = 1
    loops: int = 1
    outside: bool = False

    def fits(self, names: set[str]) -> bool:
        """Whether code with these functions is of the pass."""
        text = "\n".join(sorted(names))
        return all(part in text for part in self.inside) and not any(
            part in text for part in self.lacks
        )


def _step(isa: str, p: str, bits: int, draws: bool, cols: int) -> list[Pass]:
    """Return the passes of a step with Nesterov's direction.

    ``p`` is the type of parameter and gradient, ``cols`` the length of rows if they are short.
    """
    m = "signed char" if bits == 8 else "float"
    instability = f"instability<{p}, {m}>"
    options = f"Usual<true, {str(draws).lower()}, false>"
    update, usual = f"apply<{p}, true>", f"apply_as<{p}, true, {options} >"
    momentum, name = f"momentum<{p}, {m}, true, true>", "w, momentum"
    many_registers = isa == "avx512"
    at_once = many_registers and p == "float"
    nesterov: tuple[str, ...] = ()
    if at_once:
        momentum, name = f"momentum_and_update<{m}, {str(bits == 8).lower()}>", f"{name}, update"
        nesterov = (options,)
    if cols:
        each: dict[str, Any] = {"lacks": (), "elements": 64}
        short = f"momentum_of_short_rows<{cols}"
        rows = f"encode_short_rows<{cols}>"
        passes = [
            Pass("A", f"second_moment<{p}>", (f"second_moment_of_short_rows<{cols}",), **each),
            Pass("B", instability, (f"instability_of_short_rows<{cols}", "prefetch"), **each),
            Pass(name, momentum, (short, "prefetch", *nesterov), **each),
        ]
        if not at_once:
            lacks = ("for_lanes<apply_as",)
            passes.append(Pass("update", update, (usual, "prefetch"), lacks))
        passes.append(Pass("code", "encode_rows", (rows, "store_nearest"), **each))
    else:
        decode = ("decode_usual",) if bits == 8 else ()
        inside = ("prefetch", "precondition", *decode, *nesterov)
        passes = [
            Pass("A", f"second_moment<{p}>", ("prefetch",), elements=64, rows=4),
            Pass("B: u, d", instability, ("prefetch", "precondition", *decode)),
            Pass("B: sums", instability, ("add_products",), elements=64, rows=4, loops=3),
            Pass(name, momentum, inside),
        ]
        if not at_once:
            passes.append(Pass("update", update, (usual, "prefetch", "for_lanes<apply_as")))
        if bits == 8 and many_registers:
            passes.append(Pass("code", "encode", ("encode_at_once",), elements=64))
        elif bits == 8:
            block = "encode_block<false, false>"
            passes.append(Pass("code: guess", "encode", (block, "guess_of")))
            passes.append(Pass("code", "encode", (block, "code_of"), ("some",), elements=64))
    if draws:
        drawn = 3 * _VECTOR_BYTES[isa]  # kTogether vectors of counters of 8 bytes, 8 elements each
        told: dict[str, Any] = {"function": "random_bits", "inside": ("draw<3>",)}
        passes.append(Pass("random: rounds", elements=drawn / 8, **told))  # 8 of 10 in the loop
        passes.append(Pass("random: rest", elements=drawn, outside=True, **told))
    return passes


_VECTOR_BYTES = {"avx2": 32, "avx512": 64}
_STEPS: dict[str, tuple[str, int, bool, int]] = {  # arguments of _step
    "fp32, 8 bits": ("float", 8, False, 0),
    "fp32, 32 bits": ("float", 32, False, 0),
    "bf16 stochastic, 8 bits": ("Bf16", 8, True, 0),
    "bf16 nearest, 8 bits": ("Bf16", 8, False, 0),
    "fp32, 8 bits, rows of 8": ("float", 8, False, 8),
    "bf16 stochastic, 8 bits, rows of 8": ("Bf16", 8, True, 8),
    "bf16 nearest, 8 bits, rows of 8": ("Bf16", 8, False, 8),
}


def code_of(which: Pass, lines: list[str], frames: dict[int, set[str]]) -> list[Loop]:
    """Return the loops of a pass, or the code outside of loops.

    Raises:
        SystemExit: there is none.
    """
    spans = list(functions(lines))
    names = short_names([name for name, _ in spans])
    found = []
    for name, (_, span) in zip(names, spans, strict=True):
        if name != which.function:
            continue
        loops = list(innermost_loops(lines, span))
        if which.outside:
            inside = {i for loop in loops for i in loop}
            loops = [[i for i in instructions(lines, span) if i not in inside]]
            loops = [[i for i in loop if which.fits(frames[i])] for loop in loops]
        found += [loop for loop in loops if which.fits(set().union(*(frames[i] for i in loop)))]
    texts = [[lines[i] for i in loop] for loop in sorted(found, key=len)]
    columns = which.elements / which.rows
    if columns in (16, 64):
        # GCC may move pointers outside of the loop, if that is the only one.
        texts.sort(key=lambda text: not {columns, 2 * columns, 4 * columns} & {*moves(text)})
        texts = [text for text in texts if vector_instructions(text) > columns / 4]
    made = [text for text in texts if which.outside or moves(text) or len(texts) == 1]
    if len(made) < which.loops:
        raise SystemExit(f"{which.name}: no code of {which.function} has {which.inside}")
    return made[: which.loops]


def print_table(isa: str, cpus: list[str], mca: str) -> None:
    """Print instructions and cycles per element of each pass of each step."""
    lines = assembly(isa)
    frames = inlined(lines)
    width = 1 + len(cpus)
    print(f"| {isa}, per element | bytes | instructions | {' | '.join(cpus)} |")
    print("|---" * (width + 2) + "|")
    for step, (p, bits, draws, cols) in _STEPS.items():
        total = [0.0] * width
        for which in _step(isa, p, bits, draws, cols):
            cost = [0.0] * width
            for loop in code_of(which, lines, frames):
                cost[0] += len(loop) / which.elements
                for i, cpu in enumerate(cpus, 1):
                    cost[i] += cycles(loop, cpu, mca) / which.elements
            total = [x + y for x, y in zip(total, cost, strict=True)]
            print(f"| {which.name} | | {' | '.join(f'{x:.2f}' for x in cost)} |")
        size = 4 if p == "float" else 2
        moved = f"{5 * size + 3 * bits / 8:g} (AdamW {7 * size})"
        sums = " | ".join(f"**{x:.2f}**" for x in total)
        print(f"| **{step}** | {moved} | {sums} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--isa", choices=sorted(_ISA_FLAGS), default="avx2")
    parser.add_argument("--cpu", action="append", help="as llvm-mca calls it (default: znver3)")
    parser.add_argument("--mca", default="llvm-mca", help="the program (default: llvm-mca)")
    parser.add_argument("--table", action="store_true", help="sums of whole steps")
    arguments = parser.parse_args()
    cpus = arguments.cpu or ["znver3"]
    if arguments.table:
        print_table(arguments.isa, cpus, arguments.mca)
        return
    lines = assembly(arguments.isa)
    found = [
        (name, loop)
        for name, span in functions(lines)
        for numbers in innermost_loops(lines, span)
        for loop in [[lines[i] for i in numbers]]
        if moves(loop) and vector_instructions(loop) >= _SMALLEST
    ]
    names = short_names([name for name, _ in found])
    print("instructions, vector ones, moves, cycles:", *cpus)
    for name, (_, loop) in zip(names, found, strict=True):
        times = "  ".join(f"{cycles(loop, cpu, arguments.mca):6.1f}" for cpu in cpus)
        print(f"{len(loop):4d} {vector_instructions(loop):4d}  {moves(loop)!s:14}  {times}  {name}")


if __name__ == "__main__":
    main()
