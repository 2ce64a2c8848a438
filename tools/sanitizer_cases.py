"""Small steps through every CUDA kernel, for compute-sanitizer: tails, odd strides, odd addresses.

    compute-sanitizer --tool memcheck python tools/sanitizer_cases.py

Says nothing about results: ``tests/kernels/test_cuda.py`` compares those. ``--device cpu`` shows
that the cases themselves run, ``tests/tools/test_sanitizer_cases.py`` that they reach every kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(sys.path[0]) / "support"))

from passes import KINDS, Passes, cut, cuts, run_ranks
from problems import Problem, make_problem, run_ops
from shim.cases import SMALL, ListCase, Shape

import came8bit
from came8bit.ops import schema as _ops

FP32, BF16, FP16 = TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows of whole vectors, with and without whole blocks of the 8-bit code; several slabs and strips.
ROWS: list[Shape] = [(67, 264), (40, 256), (130, 520), (3, 8), (150, 1032), (1030, 16)]
# Neither: rows that do not begin on the boundary of a vector.
ODD: list[Shape] = [(67, 260), (67, 259), (33, 7), (1, 1), (2, 1030)]
# Blocks that begin in one row and end in the next; the last has rows of whole blocks after all.
STACKED: list[Shape] = [(3, 40, 264), (2, 70, 8), (5, 3, 520), (2, 9, 512)]
# More than one tile, and more than one block steps by itself.
FLAT: list[Shape] = [(70_001,), (5000,), (2056,), (3,), ()]


def coarse_cases(bits: int) -> list[ListCase]:
    """Return what reaches the kernels of coarse codes."""
    case = partial(ListCase, bits=bits)
    return [
        case(f"rows, {bits} bits", ROWS, dtypes=TYPES),
        case(f"odd, {bits} bits", ODD, dtypes=TYPES, grad_dtypes=(BF16, FP32)),
        case(f"stacked, {bits} bits", STACKED, batched=True, dtypes=TYPES),
        case(f"misaligned, {bits} bits", [(40, 256)] * 4, misaligned=True, dtypes=(BF16,)),
        case(f"flat, {bits} bits", [*FLAT, (19, 300)], factored=False, dtypes=TYPES),
    ]


CASES = [
    ListCase("rows, 8 bits", ROWS, dtypes=TYPES),
    ListCase("rows, fp32 momentum", ROWS, dtypes=TYPES, bits=32),
    ListCase("rows, mixed", ROWS, dtypes=TYPES, grad_dtypes=(BF16, FP16, FP32)),
    ListCase("rows, mixed, fp32", ROWS, dtypes=TYPES, grad_dtypes=(BF16, FP16, FP32), bits=32),
    ListCase("odd, 8 bits", ODD, dtypes=TYPES, grad_dtypes=(BF16, FP32)),
    ListCase("odd, fp32 momentum", ODD, dtypes=TYPES, bits=32),
    ListCase("stacked, 8 bits", STACKED, batched=True, dtypes=TYPES),
    ListCase("stacked, mixed", STACKED, batched=True, dtypes=(BF16, FP32), grad_dtypes=(FP16,)),
    ListCase("stacked, fp32 momentum", STACKED, batched=True, dtypes=(BF16,), bits=32),
    ListCase("kernels of a convolution", [(16, 16, 3, 3)], dtypes=(BF16,)),
    ListCase("reversed strides", [(33, 20), (40, 264)], layout="reversed", grad_layout="reversed"),
    ListCase("every second element", [(33, 21), (4, 9, 16)], layout="sliced", grad_layout="sliced"),
    ListCase("strided gradient", [(40, 256)], grad_layout="reversed", dtypes=(BF16,), bits=32),
    ListCase("misaligned, 8 bits", [(40, 256)] * 4, misaligned=True, dtypes=(BF16,)),
    ListCase("misaligned, fp32", [(40, 264)] * 4, misaligned=True, bits=32),
    ListCase("flat, fp32 momentum", FLAT, factored=False, dtypes=TYPES, bits=32),
    ListCase("flat, 8 bits", [*FLAT, (19, 300), (40, 256)], factored=False, dtypes=TYPES),
    ListCase("flat, mixed", FLAT[:3], factored=False, grad_dtypes=(BF16,), bits=32),
    ListCase(
        "flat, misaligned", [(2056,)] * 4, factored=False, misaligned=True, dtypes=(BF16,), bits=32
    ),
    ListCase(
        "flat, strided", [(70_001,), (9, 40)], factored=False, layout="sliced", grad_layout="sliced"
    ),
    # More than small arguments hold.
    ListCase("many parameters", [(3, 40)] * 60, layout="sliced", grad_layout="sliced"),
    *(case for bits in (4, 2, 0) for case in coarse_cases(bits)),
    ListCase("not finite", [(40, 256)] * 2, bad={0: float("nan")}),
    ListCase("not finite, flat", [(5000,)] * 2, bad={0: float("inf")}, factored=False, bits=32),
]
STEPS: tuple[dict[str, object], ...] = (
    {},
    {
        "cautious": True,
        "stochastic": False,
        "maximize": True,
        "bias_correction": True,
        "nesterov": True,
    },
)
"""Options of the first and the second step of every case."""


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """Return a copy with the same strides, and as far from aligned memory."""
    copied = x.untyped_storage().clone() if device == "cpu" else x.untyped_storage().cuda()
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(copied, x.storage_offset(), x.size(), x.stride())


def moved_problem(problem: Problem, device: str) -> Problem:
    """Return a copy of a parameter and its state."""
    state = {name: moved(x, device) for name, x in problem.state.items()}
    return replace(problem, param=moved(problem.param, device), state=state)


def run(case: ListCase, device: str) -> None:
    """Run the steps of one case by calling the operators."""
    problems = [moved_problem(problem, device) for problem in case.problems()]
    for step, options in enumerate(STEPS):
        lr = torch.tensor(0.01).to(device) if step else None
        grads = [moved(grad, device) for grad in case.grads(step)]
        run_ops(problems, grads, **options, lr_tensor=lr)


def run_sharded(kind: str, device: str, count: int = 1) -> None:
    """Run the passes over the rows of three ranks, the last of which has none."""
    generator = torch.Generator().manual_seed(0)
    whole = make_problem(dtype=BF16, generator=generator, **KINDS[kind])
    where = cuts(whole.param.shape[0])
    ranks = [[moved_problem(cut(whole, *rows), device) for _ in range(count)] for rows in where]
    for options in STEPS:
        grad = torch.randn(whole.param.shape, generator=generator).to(device)
        run_ranks(
            [
                [Passes(whole, part, grad.narrow(0, *rows), None, options) for part in parts]
                for parts, rows in zip(ranks, where, strict=True)
            ]
        )


def run_optimizer(device: str) -> None:
    """As users do: several kinds of parameters, the state made by the first step."""
    shapes = [(130, 520), (70, 4096), (2, 40, 300), (16, 16, 3, 3), (5000,), (3,), ()]
    params = [torch.nn.Parameter(torch.randn(shape).to(device, BF16)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape).to(device, BF16)
    optimizer = came8bit.CAME8bit(params, factored_view="last_two", weight_decay=0.1)
    optimizer.step()
    optimizer.step()


def run_codec(device: str) -> None:
    """Quantize and back."""
    for shape in ((3, 300), (2, 256), (1, 1), (5,)):
        codes, absmax = _ops.quantize_blockwise(torch.randn(shape).to(device))
        _ops.dequantize_blockwise(codes, absmax)


def main(arguments: list[str] | None = None) -> None:
    """Every case in sweeps, then small parameters by a block each; each said before it begins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    work = [(f"{case.name}, in sweeps", "0", partial(run, case)) for case in CASES]
    # What lies apart is never small.
    small = [case for case in CASES if not case.misaligned and case.layout == "contiguous"]
    work += [(case.name, "", partial(run, case)) for case in small]
    work += [(f"sharded, {kind}", "", partial(run_sharded, kind)) for kind in KINDS]
    # More than small arguments hold.
    many = partial(run_sharded, "vector", count=60)
    work += [("sharded, many parameters", "", many), ("optimizer", "", run_optimizer)]
    work += [("codec", "", run_codec)]
    for number, (name, elements, run_case) in enumerate(work, 1):
        print(f"case {number} of {len(work)}: {name}", flush=True)
        os.environ[SMALL] = elements
        run_case(device)
        if device == "cuda":  # what went wrong, went wrong here
            torch.cuda.synchronize()
    print(f"case {len(work)} of {len(work)} is done, on {device}")


if __name__ == "__main__":
    main()
