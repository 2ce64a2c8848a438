"""Compile every CUDA kernel for every architecture, and hold what ptxas says against a budget.

1. Nothing is spilled and nothing lies in local memory: no stack frame, no spill stores or loads.
2. No kernel takes more registers than ``csrc/cuda/registers.json`` allows it.
3. Every file is compiled with the flags that the results hang on.

    python build_tools/check_registers.py              compile and compare
    python build_tools/check_registers.py --update     compile and write the budget anew

Registers decide how many warps are in flight, so a change of the sources that takes more of them
has to be seen. They also depend on the compiler: the file names the release it was written with,
and with another one only spills are looked at. No GPU is needed, and any build of torch will do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "csrc" / "cuda" / "registers.json"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")

EXACT = ("--fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for 'sm_(\d+)[af]?'")
_FUNCTION = re.compile(r"ptxas info\s*: Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_CHATTER = re.compile(r"ptxas info|\s+\d+ bytes stack frame|-- ")

Registers = dict[str, dict[str, int]]
"""Registers by kernel and architecture."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    local_bytes: int  # stack frame and spills


def usages(log: str) -> Iterator[Usage]:
    """Read what ``ptxas -v`` printed."""
    kernel, architecture, local = "", "", 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            kernel, architecture, local = match[1], match[2], 0
        elif match := _STACK.search(line):
            # Also of functions that were not inlined: their frame is the kernel's.
            local += sum(map(int, match.groups()))
        elif (match := _USED.search(line)) and kernel:
            yield Usage(kernel, architecture, int(match[1]), int(match[2] or 0), local)
            kernel = ""


def readable(kernels: list[str]) -> dict[str, str]:
    """Return the names as C++ writes them, without arguments and what differs between builds."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    )
    return dict(zip(kernels, map(_short, done.stdout.splitlines()), strict=True))


def _short(name: str) -> str:
    """``void ns::f<(ns::E)2>(ns::T const*)`` as ``f<E(2)>``; the arguments follow from the name."""
    plain = name.replace("(anonymous namespace)::", "").replace("came8bit::", "")
    plain = re.sub(r"\((\w+)\)(\d+)", r"\1(\2)", plain.removeprefix("void "))
    depth = 0
    for place in range(len(plain) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(plain[place], 0)
        if depth == 0:
            return plain[:place]
    return plain


def problems(found: list[Usage], budget: dict[str, Any], nvcc: str) -> list[str]:
    """Return what is wrong with ``found``."""
    wrong = [
        f"{use.kernel}, sm_{use.architecture}: {use.local_bytes} bytes of local memory"
        for use in found
        if use.local_bytes
    ]
    seen = {use.architecture for use in found}
    wrong += [f"nothing was compiled for sm_{a}" for a in ARCHITECTURES if a not in seen]
    if budget["nvcc"] != nvcc:
        return wrong
    allowed: Registers = budget["registers"]
    update = "run build_tools/check_registers.py --update"
    for use in found:
        limit = allowed.get(use.kernel, {}).get(use.architecture)
        what = f"{use.kernel}, sm_{use.architecture}"
        if limit is None:
            wrong.append(f"{what}: not in {BUDGET.name}; {update}")
        elif use.registers > limit:
            wrong.append(f"{what}: {use.registers} registers, expected at most {limit}")
    gone = allowed.keys() - {use.kernel for use in found}
    return wrong + [f"{BUDGET.name} lists {name}, which is gone; {update}" for name in sorted(gone)]


def compile_all(folder: Path, jobs: int) -> tuple[str, str]:
    """Build the CUDA library in ``folder``; return nvcc's release and all that was printed."""
    environment = {**os.environ, "CAME8BIT_CUDA": "compile-only"}
    source = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"]
    commands = (
        [*source, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder), "--target", "_C_cuda", "--parallel", str(jobs)],
    )
    output = ""
    for command in commands:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        output += done.stdout
        if done.returncode:
            lines = [line for line in output.splitlines() if not _CHATTER.match(line)]
            raise SystemExit("\n".join([*lines[-60:], f"{' '.join(command)} failed"]))
    note = json.loads((folder / "came8bit-cuda.json").read_text(encoding="utf-8"))
    return ".".join(note["nvcc"].split(".")[:2]), output


def flag_problems(folder: Path) -> list[str]:
    """Return which CUDA files of the build in ``folder`` lack a flag of EXACT, or have more."""
    commands = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    cuda = {
        Path(c["file"]).name: c["command"].split() for c in commands if c["file"].endswith(".cu")
    }
    problems = [
        f"{name} is compiled without {flag}"
        for name, command in cuda.items()
        for flag in EXACT
        if flag not in command
    ]
    fast = [name for name, command in cuda.items() if re.search("fast[-_]math", " ".join(command))]
    return problems + [f"{name} is compiled with fast math" for name in fast]


def budget_text(nvcc: str, registers: Registers) -> str:
    """Return the content of the budget: JSON with one line for each kernel."""
    rows = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in registers.items())
    return f'{{\n "nvcc": "{nvcc}",\n "registers": {{\n  {rows}\n }}\n}}\n'


def table(found: list[Usage]) -> list[str]:
    """Return registers by kernel and architecture, as aligned text."""
    cells = {(use.kernel, use.architecture): str(use.registers) for use in found}
    names = sorted({use.kernel for use in found})
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"{'sm_' + a:>8}" for a in ARCHITECTURES)]
    for name in names:
        row = "".join(f"{cells.get((name, a), '-'):>8}" for a in ARCHITECTURES)
        lines.append(f"{name:<{width}}{row}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Compile, compare or update, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--build-dir", type=Path, help="a new folder that is kept")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.build_dir or Path(temporary)
        if (folder / "CMakeCache.txt").exists():
            parser.error(f"--build-dir: {folder} holds a build; ptxas would not run again")
        nvcc, output = compile_all(folder, options.jobs)
        wrong = flag_problems(folder)
    found = list(usages(output))
    names = readable([use.kernel for use in found])
    found = [Usage(names[use.kernel], *list(vars(use).values())[1:]) for use in found]
    print("\n".join(table(found)))
    if options.update:
        registers: Registers = {}
        for use in sorted(found, key=lambda use: (use.kernel, int(use.architecture))):
            row = registers.setdefault(use.kernel, {})
            row[use.architecture] = max(row.get(use.architecture, 0), use.registers)
        BUDGET.write_text(budget_text(nvcc, registers), encoding="utf-8")
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    wrong += problems(found, budget, nvcc)
    for problem in wrong:
        print(problem, file=sys.stderr)
    kernels = len({use.kernel for use in found})
    note = "" if budget["nvcc"] == nvcc else f"; budget is of {budget['nvcc']}, NOT compared"
    print(
        f"{kernels} kernels for {len(ARCHITECTURES)} architectures by nvcc {nvcc} in "
        f"{time.monotonic() - begin:.0f} s: {len(wrong)} problems{note}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
