"""Mistakes that the tests of the CUDA kernels have to notice, and the machinery to make them.

A mutant is one edit of a copy of ``csrc``. It has to apply: where the sources change, it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from .build import BUILDS, CSRC, HERE, Build, run_python

DIFFERENT = 3
"""Exit status of ``check.py`` where a result is wrong; a sanitizer's is 66, a crash is negative."""
CAUGHT = {DIFFERENT: "comparison", 66: "sanitizer", -6: "abort", -7: "bus error", -11: "segfault"}


@dataclass(frozen=True)
class Mutant:
    """``old``, which occurs once in ``csrc/cuda/<file>``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...] = ("--order", "forward", "backward")
    sanitizer: str = ""

    def text(self, csrc: Path = CSRC) -> str:
        """The file with the mistake; ValueError if it does not apply."""
        text = (csrc / "cuda" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected once in {self.file}, found {text.count(self.old)} times: "
                f"{self.old!r}"
            )
        return text.replace(self.old, self.new)


BARRIER = "__syncthreads();"
LARGE = ("--large",)
COARSE = ("--case", "2 bits", "2 bits, looking ahead", "4 bits")

MUTANTS = [
    # Barriers.
    Mutant(
        "no barrier between halvings", "reduce.cuh",
        f"half >= stop; half /= 2) {{\n    {BARRIER}", "half >= stop; half /= 2) {",
    ),
    Mutant(
        "no barrier before a buffer is used again", "tile.cuh",
        f"{BARRIER}  // the previous user of the buffer is done", "",
    ),
    Mutant(
        "no barrier behind the row factors", "instability.cuh",
        f"{BARRIER}\n  const int64_t rows = p.b * p.n;", "const int64_t rows = p.b * p.n;",
    ),
    Mutant(
        "no barrier behind the copy of the parameter", "kernels.cuh",
        f"out[threadIdx.x] = in[threadIdx.x];\n  {BARRIER}", "out[threadIdx.x] = in[threadIdx.x];",
    ),
    Mutant(
        "no barrier behind the sums of a small flat parameter", "kernels.cuh",
        f"flat_sum_tile<fast, false>(p, s, task, buffer);\n  {BARRIER}",
        "flat_sum_tile<fast, false>(p, s, task, buffer);",
    ),
    Mutant(
        "no barrier behind the sums of each matrix", "second_moment.cuh",
        f"{BARRIER}\n  if (threadIdx.x >= kWarp) return {{}};",
        "if (threadIdx.x >= kWarp) return {};",
    ),
    Mutant(
        "no __syncwarp before absmax is written", "apply.cuh",
        "__syncwarp();  // all lanes have read the old absmax before one writes the new\n      if",
        "if",
        ("--case", "fast", "--steps", "1", "--workers", "3", "--small", "0"), "thread",
    ),
    # Tails.
    Mutant(
        "the last column is left out", "tile.cuh",
        "const int64_t there = p.k - column;", "const int64_t there = p.k - column - 1;",
    ),
    Mutant(
        "one column too many is stored", "tile.cuh",
        "if (first + i < p.k) out[first + i]", "if (first + i <= p.k) out[first + i]",
    ),
    Mutant(
        "the last block has one element too many", "codec.cuh",
        "const int64_t left = slice_len - at;", "const int64_t left = slice_len - at + 1;",
    ),
    # Rows and columns, blocks and parameters.
    Mutant(
        "row and column partials are swapped", "second_moment.cuh",
        "(is_row ? p.row_new : p.col_new)[at]", "(is_row ? p.col_new : p.row_new)[at]",
    ),
    Mutant(
        "the block scale is that of a warp", "apply.cuh",
        "encode_vector(m, w, there, tile.lanes, &codes)",
        "encode_vector(m, w, there, kWarp, &codes)",
    ),
    Mutant(
        "a rough root is trusted too far", "codec.cuh",
        "0.5f - kRoughRootError", "0.5f",
    ),
    # The fast path of the encoder.
    Mutant(
        "the largest of a block lacks its last exchange", "codec.cuh",
        "largest_of_lanes<bits>(largest_magnitude(m), lanes)",
        "largest_of_lanes<bits>(largest_magnitude(m), lanes == kWarp ? kWarp / 2 : lanes)",
    ),
    Mutant(
        "the signs of momenta get lost", "codec.cuh",
        "float_bits(root) | (float_bits(m[i]) & 0x80000000u)", "float_bits(root)",
    ),
    Mutant(
        "levels are a little too large", "codec.cuh",
        "level_scale_of_usual(absmax, kSquare);",
        "level_scale_of_usual(absmax, kSquare) * 1.0001f;",
    ),
    Mutant(
        "two neighbours exchange their random bits", "vector_access.cuh",
        "float_bits(x[2 * i]) + (word & 0xffffu)", "float_bits(x[2 * i]) + (word >> 16)",
    ),
    Mutant(
        "decay is added", "apply.cuh",
        "decay_and_apply(p[i], shrink,", "decay_and_apply(p[i], -shrink,",
    ),
    # Coarse codes.
    Mutant(
        "what a coarse code forgets is lost", "apply.cuh",
        "kCoarse<M> ? spend(of_rule, m, held, spent) : of_rule", "of_rule", COARSE,
    ),
    Mutant(
        "a coarse code remembers where the update was zero", "coarse.cuh",
        "idle[i] == 0.0f ? 0.0f : m[i]", "m[i]", COARSE,
    ),
    Mutant(
        "coarse blocks are as wide as a warp", "apply.cuh",
        "tile.lanes < kCoarseLanes ? tile.lanes : kCoarseLanes", "tile.lanes", COARSE,
    ),
    Mutant(
        "scales of coarse blocks are those of the first in a strip", "instability.cuh",
        "column_scales<M>(tile.column);", "column_scales<M>(tile.column & ~255);", COARSE,
    ),
    Mutant(
        "a zero counts in the block before", "coarse.cuh",
        ">> first_lane & of_block", "& of_block", COARSE,
    ),
    Mutant(
        "values at the mean are above it", "coarse.cuh",
        "static_cast<uint32_t>(size), total)", "static_cast<uint32_t>(size), total - 1)", COARSE,
    ),
    Mutant(
        "blocks of 2 bits are full", "coarse.cuh",
        "BlockPlace<kCoarseBlock>& place, float* held) {\n  const M stored =\n"
        "      encode_block(held, place.count, place.size,",
        "BlockPlace<kCoarseBlock>& place, float* held) {\n  const M stored =\n"
        "      encode_block(held, place.count, kCoarseBlock,", COARSE,
    ),
    Mutant(
        "no __syncwarp before scales are written", "apply.cuh",
        "__syncwarp();  // all lanes have read the old scales before one writes the new", "",
        ("--case", "2 bits", "--steps", "1", "--workers", "3", "--small", "0"), "thread",
    ),
    # Narrow rows and mixed types.
    Mutant(
        "rows that share a warp lack an exchange", "reduce.cuh",
        "return sum_lanes(sum, lanes / rows);", "return sum_lanes(sum, lanes / (2 * rows));",
    ),
    Mutant(
        "rows of two lanes are those of one", "tile.cuh",
        "sum_lanes(sums[q], tile.lanes)", "sum_lanes(sums[q], tile.lanes / 2)",
    ),
    Mutant(
        "parameters are taken to have the gradient's type", "groups.h",
        "if (p.param.dtype == p.grad.dtype) kind", "kind",
    ),
    Mutant(
        "a parameter begins one block late", "kernels.cuh",
        "parameters[i + 1].first[phase] <= block", "parameters[i + 1].first[phase] < block",
    ),
    Mutant(
        "the backward walk begins one block late", "kernels.cuh",
        "int64_t{gridDim.x} - 1 - blockIdx.x", "int64_t{gridDim.x} - 2 - blockIdx.x",
    ),
    Mutant(
        "every block counts the step", "instability.cuh",
        "if (task == 0 && threadIdx.x == 0) {\n    if (done) {",
        "if (threadIdx.x == 0) {\n    if (done) {",
    ),
    Mutant(
        "the random bits of the next vector", "apply.cuh",
        "random_words(element / 8, index", "random_words(element / 8 + 1, index",
    ),
    Mutant(
        "arrays of the workspace overlap", "groups.h",
        "arena.take<float>(3 * p.b * p.row_chunks());\n  p.col",
        "arena.take<float>(p.b * p.row_chunks());\n  p.col",
    ),
    Mutant(
        "alignment is taken for granted", "groups.h",
        "if (!aligned(p.param.data, 16) ||", "if (",
    ),
    # Passes, of rows that several ranks have.
    Mutant(
        "columns have the rows of this rank", "passes.cuh",
        "second_moment_chunk(p, s, chunk, sum, rows_of(p, shared));",
        "second_moment_chunk(p, s, chunk, sum, static_cast<float>(p.n));",
    ),
    Mutant(
        "c is that of the rows of this rank", "passes.cuh",
        "if (chunk.is_row || !is_split(shared)) {", "if (true) {",
    ),
    Mutant(
        "kappa is that of the elements of this rank", "passes.cuh",
        "root_mean(reduced(shared, 0), numel)",
        "root_mean(reduced(shared, 0), static_cast<float>(p.numel()))",
    ),
    Mutant(
        "the last pass draws the bits of the next step", "passes.cuh",
        "pass == Pass::kApply ? 0 : 1", "1",
    ),
    Mutant(
        "a rank without rows does nothing", "step.cu",
        "empty_too = true;", "empty_too = false;",
    ),
    # Indices of 32 bits.
    Mutant(
        "32-bit index of sweep C", "apply.cuh",
        "e = row * p.k + tile.column;", "e = static_cast<int>(row * p.k + tile.column);", LARGE,
    ),
    Mutant(
        "32-bit index of sweeps A and B", "tile.cuh",
        "bytes_at<G>(p.grad, (tile.first_row + tile.stream) * p.k + tile.column)",
        "bytes_at<G>(p.grad, int((tile.first_row + tile.stream) * p.k + tile.column))",
        LARGE,
    ),
    Mutant(
        "32-bit index of a block of the code", "codec.cuh",
        "first = slice * slice_len + at;", "first = static_cast<int>(slice * slice_len + at);",
        LARGE,
    ),
    Mutant(
        "32-bit index of a byte of codes", "coarse.cuh",
        "slice * bytes_of_slice(p.slice_len, kBits<M>) +",
        "static_cast<int>(slice * bytes_of_slice(p.slice_len, kBits<M>)) +", LARGE,
    ),
    Mutant(
        "32-bit offset of a strided element", "vector_access.cuh",
        "int64_t offset = 0;", "int offset = 0;", LARGE,
    ),
]  # fmt: skip


@dataclass
class Workshop:
    """A copy of ``csrc``, mutants of which are built one after the other."""

    name: str
    sanitizer: str = ""
    build: Build = field(init=False)

    def __post_init__(self) -> None:
        folder = BUILDS / f"mutants-{self.name}"
        self.build = Build(
            self.name, sanitizer=self.sanitizer, csrc=folder / "csrc", few_types=True,
            folder=folder / "build",
        )  # fmt: skip

    def _write(self, changed: dict[str, str]) -> None:
        """Make the copy equal to ``csrc`` but for ``changed``; files that stay keep their age."""
        copy = self.build.csrc
        kept = set()
        for path in CSRC.rglob("*"):
            if path.is_dir():
                continue
            target = copy / path.relative_to(CSRC)
            kept.add(target)
            text = changed.get(path.name, path.read_text())
            if not target.exists() or target.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
        for target in copy.rglob("*"):
            if target.is_file() and target not in kept:
                target.unlink()

    def check(self, mutant: Mutant | None, *arguments: str) -> tuple[int, str]:
        """Build with a mistake, or without, and compare; exit status and output of ``check.py``."""
        self._write({mutant.file: mutant.text()} if mutant else {})
        library = self.build.make("_C_shim")
        done = run_python(self.build, HERE / "check.py", library, *arguments)
        return done.returncode, (done.stdout + done.stderr)[-3000:]


@contextmanager
def borrowed(workshops: Queue[Workshop]) -> Iterator[Workshop]:
    """One of ``workshops``, once one is free."""
    workshop = workshops.get()
    try:
        yield workshop
    finally:
        workshops.put(workshop)
