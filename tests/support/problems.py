"""Random parameters with their state, for tests that compare two executions of the rule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from came8bit import reference
from came8bit.ops import schema
from came8bit.reference import quant
from came8bit.reference.reduction import CPU_TREE, Tree
from came8bit.reference.rungs import RUNGS

HYPER = dict(
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    beta3=0.9999,
    eps1=1e-30,
    eps2=1e-16,
    clip_threshold=1.0,
    weight_decay=0.01,
)
OPTIONS = dict(
    stochastic=True,
    cautious=False,
    propagate=False,
    maximize=False,
    bias_correction=False,
    nesterov=False,
    seed=1234567890123,
)


@dataclass
class Problem:
    """One parameter, its state in the order the operators take it, and what its bits depend on."""

    param: Tensor
    state: dict[str, Tensor]
    factored: bool
    index: int = 0
    offset: int = 0
    grad_square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def run_op(self, grad: Tensor, **changes: object) -> None:
        """One step through the dispatcher."""
        run_ops([self], [grad], **changes)

    def run_reference(self, grad: Tensor, tree: Tree = CPU_TREE, **changes: object) -> None:
        """One step of the specification."""
        hyper = reference.Hyper(**{**HYPER, **OPTIONS, **changes})  # type: ignore[arg-type]
        step = reference.factored_step_ if self.factored else reference.unfactored_step_
        places = {"index": self.index, "offset": self.offset}
        self.grad_square = step(
            param=self.param, grad=grad, **self.state, **places, hyper=hyper, tree=tree
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything a step may change."""
        return {"param": self.param, **self.state}

    def outcome(self) -> dict[str, Tensor]:
        """The same, and what a step gives out."""
        return {**self.tensors(), "grad_square": self.grad_square}

    def copy(self) -> Problem:
        """Deep copy with the same strides."""
        return copy.deepcopy(self)


def operator_of(problems: list[Problem]) -> Callable[..., None]:
    """The operator that takes a step of ``problems``."""
    factored = problems[0].factored
    operator: Callable[..., None] = schema.factored_step_ if factored else schema.unfactored_step_
    return operator


def arguments_of(
    problems: list[Problem], grads: list[Tensor], **changes: object
) -> dict[str, object]:
    """Its arguments, by name and in the order of the schema."""
    columns = {name: [p.state[name] for p in problems] for name in problems[0].state}
    return {
        "params": [p.param for p in problems],
        "grads": grads,
        "exp_avg": columns.pop("exp_avg"),
        "absmax": columns.pop("absmax", []),
        **columns,
        "param_index": [p.index for p in problems],
        "element_offset": [p.offset for p in problems],
        "lr_tensor": None,
        **HYPER,
        **OPTIONS,
        **changes,
    }


def run_ops(problems: list[Problem], grads: list[Tensor], **changes: object) -> None:
    """One operator call for several problems of the same kind."""
    squares = torch.zeros(len(problems), device=grads[0].device)
    operator_of(problems)(**arguments_of(problems, grads, grad_squares=squares, **changes))
    for problem, square in zip(problems, squares, strict=True):
        problem.grad_square = square.clone()


def generator(seed: int = 0) -> torch.Generator:
    """A new generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def make_problem(
    shape: tuple[int, ...],
    *,
    factored: bool = True,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
    batched: bool = False,
    index: int = 3,
    offset: int = 0,
    generator: torch.Generator,
) -> Problem:
    """A parameter of ``shape`` with fresh state; ``batched`` factors the last two dimensions."""
    param = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    b, n = (math.prod(shape[:-2]), shape[-2]) if batched else (1, shape[0] if shape else 1)
    k = math.prod(shape) // (b * n) if b * n else 0
    state: dict[str, Tensor] = {}
    if bits == 8:
        state["exp_avg"] = torch.zeros(shape, dtype=torch.int8)
        state["absmax"] = torch.zeros(quant.absmax_shape(shape))
    elif bits in RUNGS:
        rung = RUNGS[bits]
        state["exp_avg"] = torch.zeros(rung.codes_shape(shape), dtype=rung.code_dtype)
        state["absmax"] = torch.zeros(rung.scales_shape(shape), dtype=rung.scale_dtype)
    else:
        state["exp_avg"] = torch.zeros(shape)
    if factored:
        for name, size in (("sq_row", n), ("sq_col", k), ("res_row", n), ("res_col", k)):
            state[f"exp_avg_{name}"] = torch.zeros(b, size)
        state["rms_ratio"] = torch.ones(())
    else:
        state["exp_avg_sq"] = torch.zeros(shape)
    state["step"] = torch.zeros((), dtype=torch.int64)
    state["skipped"] = torch.zeros((), dtype=torch.int64)
    return Problem(param, state, factored, index, offset)


def random_grad(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, zeros: float = 0.1
) -> Tensor:
    """Gradient with very different rows and columns and a share of exact zeros."""
    grad = torch.randn(shape, generator=generator)
    for dim in range(len(shape)):
        size = [1] * len(shape)
        size[dim] = shape[dim]
        grad = grad * torch.exp(torch.randn(size, generator=generator))
    keep = torch.rand(shape, generator=generator) >= zeros
    return (grad * keep).to(dtype)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Every tensor equal to the last bit (NaN equals NaN), with a readable difference."""
    for name, tensor in expected.items():
        if not equal_bits(got[name], tensor):
            a, b = got[name].double(), tensor.double()
            wrong = ~((a == b) | (a.isnan() & b.isnan()))
            first = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{what}: {name} differs in {int(wrong.sum())} of {wrong.numel()} elements, "
                f"first at {first}: got {a[tuple(first)]!r}, expected {b[tuple(first)]!r}"
            )


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """``torch.equal`` where NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    both_nan = a.isnan() & b.isnan()
    return torch.equal(torch.where(both_nan, 0, a), torch.where(both_nan, 0, b))


def near_code_edges() -> Tensor:
    """fp32 values, (288, 256): blocks of the 8-bit code whose values are all as far from where one
    code ends and the next begins, from nothing to 2**-8 of a level, on either side of it.
    """
    generator = torch.Generator().manual_seed(0)
    distance = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-24, -7)]).repeat(16)[:, None]
    side = torch.randint(0, 2, (len(distance), 255), generator=generator) * 2 - 1
    edge = torch.randint(0, 127, side.shape, generator=generator) + 0.5
    sign = torch.randint(0, 2, side.shape, generator=generator) * 2 - 1
    absmax = torch.exp(torch.randn(len(distance), 1, generator=generator) * 20).clamp(1e-37, 1e37)
    x = ((edge + side * distance).double() / 127) ** 2 * absmax * sign
    return torch.cat([absmax, x.float()], dim=1)
