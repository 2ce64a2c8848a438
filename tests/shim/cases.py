"""Steps on the shim against the reference: what is compared, and a table of small cases.

The table serves three masters, each in a process of its own: the race detector, the address
sanitizer, and builds with a mistake in them (``check.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from passes import Passes, cut, cuts, run_passes
from problems import Problem, assert_same_bits, make_problem, random_grad, run_ops
from strategies import laid_out
from torch import Tensor

from came8bit.ops import schema
from came8bit.reference import quant
from came8bit.reference.reduction import CUDA_TREE, CudaTree, Tree

from .library import kernels

Shape = tuple[int, ...]

SMALL = "CAME8BIT_CUDA_SMALL_ELEMENTS"
GROUP = "CAME8BIT_CUDA_GROUP_BYTES"


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Within it torch's new tensors, workspaces too, are full of 0xFF."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class ListCase:
    """One operator call for a list of parameters of one kind, several steps.

    ``misaligned``: in turn the parameter, its gradient, its momentum, or all of them lie one
    element further than a vector would have to.
    ``zeros``: share of exact zeros in the gradients. With 0.1 every block of the 8-bit code decays
    somewhere, which takes the slow path of the encoder.
    ``bad``: in the second step the gradient of parameter ``i`` has the value ``bad[i]`` somewhere.
    """

    name: str
    shapes: Sequence[Shape]
    factored: bool = True
    batched: bool = False
    bits: int = 8
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    grad_dtypes: Sequence[torch.dtype] | None = None
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    misaligned: bool = False
    zeros: float = 0.1
    bad: dict[int, float] = field(default_factory=dict)
    steps: int = 2
    options: dict[str, object] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        """The parameters with fresh state; dtypes take turns."""
        problems = []
        for i, shape in enumerate(self.shapes):
            problem = make_problem(
                shape,
                factored=self.factored,
                bits=self.bits,
                dtype=self.dtypes[i % len(self.dtypes)],
                batched=self.batched,
                index=i,
                offset=16 * i,
                generator=torch.Generator().manual_seed(i),
            )
            problem.param = laid_out(problem.param, self.layout)
            if self.misaligned and i % 4 in (0, 3):
                problem.param = displaced(problem.param)
            if self.misaligned and i % 4 == 2:
                problem.state["exp_avg"] = displaced(problem.state["exp_avg"])
            if self.misaligned and i % 4 == 3:
                problem.state = {name: displaced(x) for name, x in problem.state.items()}
            problems.append(problem)
        return problems

    def grads(self, step: int) -> list[Tensor]:
        """Their gradients at ``step``."""
        dtypes = self.grad_dtypes or self.dtypes
        generator = torch.Generator().manual_seed(1000 + step)
        grads = [
            random_grad(shape, dtypes[i % len(dtypes)], generator, self.zeros)
            for i, shape in enumerate(self.shapes)
        ]
        grads = [laid_out(grad, self.grad_layout) for grad in grads]
        for i, value in self.bad.items() if step == 1 else ():
            grads[i].view(-1)[grads[i].numel() // 2] = value
        if self.misaligned:
            grads = [displaced(x) if i % 4 in (1, 3) else x for i, x in enumerate(grads)]
        return grads

    def check(self, steps: int | None = None) -> None:
        """Step kernels and reference side by side; AssertionError where a bit differs."""
        got = self.problems()
        expected = [problem.copy() for problem in got]
        for t in range(steps or self.steps):
            grads = self.grads(t)
            with kernels(), uninitialised_memory_is_nan():
                run_ops(got, grads, **self.options)
            for i, (mine, other) in enumerate(zip(got, expected, strict=True)):
                if other.param.numel() > 0:  # kernels leave an empty parameter alone
                    run_shim_reference(other, grads[i], **self.options)
                what = f"{self.name}, step {t}, parameter {i} {self.shapes[i]}"
                assert_same_bits(mine.tensors(), other.tensors(), what)

    def check_passes(self, steps: int | None = None) -> None:
        """The same of steps pass by pass, with each parameter cut into the rows of three ranks.

        The rows that a rank has of all parameters are one call, as in ``came8bit.ops.sharded``.
        """
        problems = self.problems()
        members = [i for i, problem in enumerate(problems) if self._has_rows(problem.param)]
        whole = [problems[i] for i in members]
        where = [cuts(problem.param.shape[0]) for problem in whole]
        ranks = [(rank, tree) for tree in (None, SHIM_TREE) for rank in range(3)]
        parts = [[cut(p, *rows[rank]) for p, rows in zip(whole, where, strict=True)]
                 for rank, _ in ranks]  # fmt: skip
        for t in range((steps or self.steps) if whole else 0):
            grads = self.grads(t)
            running = [
                [
                    Passes(p, part, grads[i].narrow(0, *rows[rank]), tree, self.options)
                    for i, p, part, rows in zip(members, whole, here, where, strict=True)
                ]
                for (rank, tree), here in zip(ranks, parts, strict=True)
            ]
            reduced: list[Tensor] = []
            for number in range(4):
                for here in running:
                    with kernels(), uninitialised_memory_is_nan():
                        run_passes(number, here, reduced)
                for rank, (got, expected) in enumerate(zip(running[:3], running[3:], strict=True)):
                    what = f"{self.name}, step {t}, pass {number}, rank {rank}"
                    for mine, other in zip(got, expected, strict=True):
                        assert_same_bits(mine.outcome(number), other.outcome(number), what)
                if number < 3:
                    reduced = [
                        torch.stack([part.sums[number] for part in everywhere]).sum(0)
                        for everywhere in zip(*running[:3], strict=True)
                    ]

    def _has_rows(self, param: Tensor) -> bool:
        """Whether ranks can share it: vectors have no rows of codes."""
        return param.numel() > 0 and param.dim() > (0 if self.bits == 32 else 1)


def step(problems: list[Problem], grads: list[torch.Tensor], **options: object) -> None:
    """One operator call on the shim, in memory that nothing has put in order."""
    with kernels(), uninitialised_memory_is_nan():
        run_ops(problems, grads, **options)


def displaced(x: Tensor) -> Tensor:
    """A contiguous ``x`` one element further: aligned to its own size and no more."""
    if not x.is_contiguous():
        return x
    base = torch.empty(x.numel() + 1, dtype=x.dtype)
    return base[1:].view(x.shape).copy_(x)


SHIM_TREE = CudaTree(column_part_bytes=1000, row_part_bytes=2000)
"""That of the shim (``csrc/cuda/parameter.h``): tiles of few elements are as those of many."""


def run_reference(
    problem: Problem, grad: Tensor, tree: Tree = CUDA_TREE, **options: object
) -> None:
    """One step of the specification with the sums of the CUDA kernels."""
    problem.run_reference(grad, tree, **options)


run_shim_reference = partial(run_reference, tree=SHIM_TREE)


def check_codec(shape: Shape, scale: float = 1.0, special: bool = False) -> None:
    """Codes and scales, and the values they stand for, as the reference has them."""
    check_codec_of(random_values(shape, scale, special))


def random_values(shape: Shape, scale: float, special: bool) -> Tensor:
    """Normally distributed, with some that are ``special``."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    if special and x.numel():
        flat = x.view(-1)
        for i, value in enumerate((math.nan, math.inf, -math.inf, 0.0, 3e38, 1e-40)):
            flat[(i * 97 + 5) % len(flat)] = value
    return x


def check_codec_of(x: Tensor) -> None:
    """The same for given values."""
    codes, absmax = quant.quantize_blockwise(x)
    with kernels(), uninitialised_memory_is_nan():
        got_codes, got_absmax = schema.quantize_blockwise(x)
        got = schema.dequantize_blockwise(codes, absmax)
    assert_same_bits(
        {"codes": got_codes, "absmax": got_absmax, "values": got},
        {"codes": codes, "absmax": absmax, "values": quant.dequantize_blockwise(codes, absmax)},
        f"codec {tuple(x.shape)}",
    )


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Whole vectors and blocks ("fast"); tails in rows, columns, strips and slabs; one element; none.
FAST: list[Shape] = [(9, 264), (40, 256), (60, 512), (3, 8)]
SLOW: list[Shape] = [(9, 261), (67, 33), (1, 1), (0, 5), (5, 300)]
FLAT: list[Shape] = [(1,), (8,), (300,), (0,), (2056,)]
# A row takes 2, 4, 8 and 16 lanes of a warp.
NARROW: list[Shape] = [(70, 16), (70, 24), (67, 64), (35, 128)]

# No zeros, so that blocks take the encoder's fast path, and a decay that shows in bf16.
DENSE: dict[str, Any] = {"zeros": 0.0, "options": {"lr": 0.1, "weight_decay": 0.5}}


def coarse_cases(bits: int) -> list[ListCase]:
    """What the codes of 4 bits and fewer have of their own: blocks of 128 values, half a warp."""
    case = partial(ListCase, bits=bits)
    fast = [(9, 264), (20, 136), (5, 384), (3, 8)]
    looking_ahead = {"nesterov": True, "cautious": True, "bias_correction": True}
    return [
        case(f"{bits} bits", fast, dtypes=(BF16, FP32), steps=3),
        case(f"{bits} bits, dense", fast, dtypes=(BF16, FP16, FP32), **DENSE),
        case(f"{bits} bits, narrow", NARROW, dtypes=(BF16,), **DENSE),
        case(
            f"{bits} bits, looking ahead",
            [*fast[:2], *SLOW],
            dtypes=(BF16, FP32, FP16),
            options=looking_ahead,
        ),
        # Blocks that end where rows do, and others.
        case(f"{bits} bits, batched", [(5, 2, 128), (2, 3, 264), (3, 5, 33)], batched=True),
        case(f"{bits} bits, misaligned", [(3, 256)] * 4, misaligned=True, dtypes=(BF16,)),
        case(
            f"{bits} bits, not finite",
            fast,
            bad={0: math.nan, 2: math.inf},
            options={"propagate": True, "stochastic": False},
        ),
        case(f"{bits} bits, flat", [*FLAT[:3], (7, 300)], factored=False, dtypes=(BF16, FP32)),
        case(
            f"{bits} bits, flat, looking ahead",
            FLAT,
            factored=False,
            bad={2: math.inf},
            options={**looking_ahead, "propagate": True},
        ),
    ]


CASES = [
    ListCase("fast", FAST, dtypes=(FP32, BF16), steps=3),
    ListCase("dense", FAST, dtypes=(BF16, FP32), steps=3, **DENSE),
    ListCase("dense, slow", SLOW, dtypes=(BF16, FP16), **DENSE),
    ListCase("dense, fp16", FAST[:2], dtypes=(FP16,), **DENSE),
    ListCase("dense, narrow", NARROW, dtypes=(BF16,), **DENSE),
    ListCase("dense, batched", [(2, 3, 264), (9, 4, 256)], batched=True, dtypes=(BF16,), **DENSE),
    ListCase(
        "dense, mixed dtypes",
        [(9, 264)] * 4,
        dtypes=(BF16, FP32, FP16, BF16),
        grad_dtypes=(FP32, BF16, FP32, FP16),
        **DENSE,
    ),
    ListCase(
        "dense, flat, 8 bits",
        [*FLAT, (7, 300), (7, 256)],
        factored=False,
        dtypes=(BF16, FP16, FP32),
        **DENSE,
    ),
    ListCase("long", [(1030, 9), (1030, 16)]),
    ListCase("fast, cautious", FAST, dtypes=(BF16, FP32), options={"cautious": True}),
    ListCase("fast, looking ahead", FAST, dtypes=(BF16, FP32), options={"nesterov": True}),
    ListCase("slow", SLOW, dtypes=(BF16, FP32), steps=3),
    ListCase(
        "slow, looking ahead",
        SLOW,
        dtypes=(FP32, BF16),
        options={"nesterov": True, "cautious": True, "bias_correction": True},
    ),
    ListCase("fp32 momentum", [*FAST[:2], *SLOW[:2]], bits=32, dtypes=(BF16,)),
    ListCase(
        "fp32 momentum, cautious",
        [(9, 264), (3, 8), (5, 16), (4, 8), (9, 261)],
        bits=32,
        dtypes=(BF16, FP32, FP16, BF16),
        grad_dtypes=(BF16, FP32, FP16, FP32),
        options={"cautious": True},
    ),
    ListCase("batched", [(2, 3, 264), (3, 5, 33)], batched=True, dtypes=(BF16,)),
    ListCase("batched, cautious", [(2, 3, 264)], batched=True, options={"cautious": True}),
    ListCase("reversed", [(33, 20)], layout="reversed", grad_layout="reversed"),
    # More of them than fit into small arguments.
    ListCase("many", [(3, 5)] * 20, layout="sliced", grad_layout="sliced", steps=1),
    ListCase("misaligned", [(6, 256)] * 4, misaligned=True, dtypes=(BF16,)),
    ListCase("corrected", [(40, 256)], options={"bias_correction": True, "maximize": True}),
    ListCase("rate in a tensor", [(5, 256)], options={"lr_tensor": torch.tensor(0.01)}),
    ListCase("to nearest", [(9, 264), (9, 261)], dtypes=(BF16,), options={"stochastic": False}),
    ListCase("not finite", [(5, 256)] * 3, bad={0: math.nan, 2: math.inf}, dtypes=(BF16,)),
    ListCase("flat", FLAT, factored=False, bits=32, dtypes=(FP32, BF16), steps=3),
    ListCase(
        "flat, 8 bits",
        [*FLAT, (7, 300), (7, 256)],
        factored=False,
        options={"nesterov": True, "cautious": True},
    ),
    ListCase(
        "flat, strided",
        [(2100,)],
        factored=False,
        bits=32,
        grad_layout="sliced",
        options={"cautious": True},
    ),
    # More than one tile, in which sums pass from thread to thread.
    ListCase("flat, long", [(16400,)], factored=False, bits=32, options={"cautious": True}),
    ListCase("flat, not finite", FLAT, factored=False, bad={2: math.nan}, bits=32),
    *(case for bits in (4, 2, 0) for case in coarse_cases(bits)),
]

# Each way through the kernels of the passes; all cases take too long under a sanitizer.
OF_PASSES = (
    "fast, cautious",
    "slow, looking ahead",
    "fp32 momentum, cautious",
    "batched, cautious",
    "many",
    "not finite",
    "flat, 8 bits",
    "flat, long",
    "4 bits, batched",
    "2 bits, looking ahead",
)
