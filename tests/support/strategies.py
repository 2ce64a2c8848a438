"""Parameters of every shape, dtype and stride, gradients, options; the instruction sets to try."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from problems import Problem, make_problem, random_grad
from torch import Tensor

from came8bit.ops import libraries

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "reversed", "channels_last", "sliced"]
ELEMENTS = 30_000
"""Largest parameter of an example: the reference takes 10 ms for it."""

# Around one value, vectors of 16, blocks of 256, chunks of 1024, slabs of 64 rows, and 4096.
EDGES = [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 67, 127, 255, 256, 257, 511, 513]
EDGES += [1023, 1024, 1025, 1279, 2047, 2049, 4095, 4096, 4097]


def kernel_isas() -> list[str]:
    """The one that ``CAME8BIT_CPU_ISA`` asks for, or all that this machine has."""
    forced = os.environ.get("CAME8BIT_CPU_ISA")
    return [forced] if forced else libraries.supported_cpu_isas()


def sides(largest: int) -> st.SearchStrategy[int]:
    """Length of a dimension, 1 to ``largest``: often an edge of the implementation."""
    edges = [edge for edge in EDGES if edge <= largest]
    return st.sampled_from(edges) | st.integers(1, min(largest, 70))


@st.composite
def shapes(draw: st.DrawFn, dims: int, elements: int = ELEMENTS) -> tuple[int, ...]:
    """``dims`` sides with a product of at most ``elements``, the long ones anywhere."""
    shape: list[int] = []
    for _ in range(dims):
        shape.append(draw(sides(elements // math.prod(shape))))
    return tuple(draw(st.permutations(shape)))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with other strides."""
    if layout == "reversed":
        backwards = list(reversed(range(x.dim())))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "channels_last" and x.dim() >= 3:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced" and x.dim():
        base = x.new_full([2 * side + 1 for side in x.shape], math.nan)
        view = base[(slice(1, None, 2),) * x.dim()]
        return view.copy_(x)
    return x


@dataclass(frozen=True)
class Case:
    """What it takes to make a :class:`Problem` and its gradients again."""

    shape: tuple[int, ...]
    factored: bool
    batched: bool
    bits: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: str
    grad_layout: str
    index: int
    offset: int
    scale: float
    zeros: float
    seed: int
    options: dict[str, object] = field(default_factory=dict)

    def problem(self) -> Problem:
        """The parameter with fresh state."""
        problem = make_problem(
            self.shape,
            factored=self.factored,
            bits=self.bits,
            dtype=self.dtype,
            batched=self.batched,
            index=self.index,
            offset=self.offset,
            generator=torch.Generator().manual_seed(self.seed),
        )
        problem.param = laid_out(problem.param, self.layout)
        return problem

    def grads(self, steps: int) -> list[Tensor]:
        """Gradients of ``steps`` steps; the last two agree, as they do late in training."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        grads = [
            random_grad(self.shape, torch.float32, generator, self.zeros) * self.scale
            for _ in range(max(1, steps - 1))
        ]
        grads = [*grads, grads[-1]][:steps]
        return [laid_out(g.to(self.grad_dtype), self.grad_layout) for g in grads]


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, object]:
    """Hyper-parameters and options of an operator call, often the defaults."""
    if draw(st.booleans()):
        return {}
    options: dict[str, object] = {
        name: draw(st.booleans())
        for name in (
            "stochastic",
            "cautious",
            "propagate",
            "maximize",
            "bias_correction",
            "nesterov",
        )
    }
    choices = {
        "beta1": [0.9, 0.0, 0.5, 0.99],
        "beta2": [0.999, 0.0, 0.9],
        "beta3": [0.9999, 0.0, 0.5],
        "eps1": [1e-30, 1e-8],
        "clip_threshold": [1.0, 0.01, 100.0, math.inf],
        "lr": [1e-3, 0.0, 1.0, 1e-7],
        "weight_decay": [0.01, 0.0, 0.5],
        "seed": [1234567890123, 0, 2**63 - 1],
    }
    return {**options, **{name: draw(st.sampled_from(c)) for name, c in choices.items()}}


@st.composite
def cases(draw: st.DrawFn, elements: int = ELEMENTS) -> Case:
    """Everything at once."""
    factored = draw(st.integers(0, 3)) > 0
    dims = draw(st.integers(2, 4) if factored else st.integers(0, 3))
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        shape=draw(shapes(dims, elements)),
        factored=factored,
        batched=factored and draw(st.booleans()),
        bits=draw(st.sampled_from([8, 8, 32, 4, 2, 0])),
        dtype=dtype,
        grad_dtype=draw(st.sampled_from([dtype, *DTYPES])),
        layout=draw(st.sampled_from(["contiguous", *LAYOUTS])),
        grad_layout=draw(st.sampled_from(["contiguous", *LAYOUTS])),
        index=draw(st.sampled_from([0, 3, 147, 2**31 - 1])),
        offset=draw(st.sampled_from([0, 8, 5, 2**32 - 8, 2**40 + 3])),
        scale=draw(st.sampled_from([1.0, 1.0, 1e-3, 1e-20, 1e12, 1e19])),
        zeros=draw(st.sampled_from([0.1, 0.0, 0.9, 1.0])),
        seed=draw(st.integers(0, 2**32)),
        options=draw(option_sets()),
    )
