"""The passes of a step over a parameter that is cut into the rows of several ranks."""

from __future__ import annotations

from typing import Any

import torch
from problems import HYPER, OPTIONS, Problem, arguments_of, operator_of
from torch import Tensor

from came8bit import reference
from came8bit.ops import schema
from came8bit.reference.reduction import Tree

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": dict(shape=(37, 300)),
    "4 bits": dict(shape=(37, 301), bits=4),
    "2 bits": dict(shape=(37, 301), bits=2),
    "0 bits": dict(shape=(37, 301), bits=0),
    # Not so many rows that on the shim the order of a row's sum depends on how many are here.
    "32 bits": dict(shape=(30, 1100), bits=32),
    "slabs": dict(shape=(150, 72), bits=32),
    "matrices": dict(shape=(6, 20, 300), batched=True),
    "convolution": dict(shape=(37, 12, 3, 3)),
    "unfactored": dict(shape=(37, 300), factored=False),
    "vector": dict(shape=(701,), factored=False, bits=32),
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    dict(cautious=True, nesterov=True, bias_correction=True),
    dict(maximize=True, clip_threshold=0.3),
)
CASES = [(kind, VARIANTS[i % 3]) for i, kind in enumerate(KINDS)]


class Passes:
    """The passes over the rows of one rank, and what is handed from one to the next.

    Args:
        whole: the parameter.
        part: its rows here, which may be all.
        grad: of these rows.
        tree: of the reference, if that is to run; None for the operators of ``schema``.
        options: of the step.
    """

    def __init__(
        self, whole: Problem, part: Problem, grad: Tensor, tree: Tree | None, options: dict
    ) -> None:
        self.problem, self.tree = part, tree
        b, n = whole.state["exp_avg_sq_row"].shape if whole.factored else (1, 0)
        k = whole.state["exp_avg_sq_col"].shape[1] if whole.factored else 0
        rows = n if whole.factored and b == 1 else 0
        columns = (k if rows else 0) if whole.factored else -1
        sizes = reference.sums_sizes(columns, bool(options.get("cautious", False)))
        new = part.param.new_full
        self.sums = [new((size,), torch.nan, dtype=torch.float64) for size in sizes]
        own = (*part.state["exp_avg_sq_row"].shape, k) if part.factored else (0, 0, 0)
        self.full = (whole.param.numel(), rows)
        self.work = new((reference.work_size(*own),), torch.nan, dtype=torch.float32)
        self.grad, self.options = grad, options

    def outcome(self, number: int) -> dict[str, Tensor]:
        """What pass ``number`` may have changed."""
        sums = {"sums": self.sums[number]} if number < 3 else {}
        return {**self.problem.tensors(), **sums}


def run_passes(number: int, parts: list[Passes], reduced: list[Tensor]) -> None:
    """Run a pass over several parameters of one kind in one call."""
    arguments = pass_arguments(number, parts, reduced)
    if parts[0].tree is None:
        operator = operator_of([part.problem for part in parts])
        return schema.PASSES[operator][number](**arguments)
    for i, part in enumerate(parts):
        _run_reference(number, part, [*reduced[i : i + 1], *arguments["sums"][i : i + 1]])
    return None


def pass_arguments(number: int, parts: list[Passes], reduced: list[Tensor]) -> dict[str, Any]:
    """The arguments of the operator of a pass, by name."""
    grads = [part.grad for part in parts]
    return {
        **arguments_of([part.problem for part in parts], grads, **parts[0].options),
        "full_numel": [part.full[0] for part in parts],
        "full_rows": [part.full[1] for part in parts],
        "reduced": reduced,
        "sums": [part.sums[number] for part in parts] if number < 3 else [],
        "work": [part.work for part in parts],
    }


def _run_reference(number: int, part: Passes, between: list[Tensor]) -> None:
    hyper = reference.Hyper(**{**HYPER, **OPTIONS, **part.options})  # type: ignore[arg-type]
    problem = part.problem
    kind = reference.FactoredStep if problem.factored else reference.UnfactoredStep
    step = kind(
        param=problem.param, grad=part.grad, **problem.state, index=problem.index,
        offset=problem.offset, numel=part.full[0], rows=part.full[1], hyper=hyper, tree=part.tree,
        work=part.work,
    )  # type: ignore[call-arg]  # fmt: skip
    getattr(step, reference.PASSES[number])(*between)


def run_ranks(ranks: list[list[Passes]], sums: list[Tensor] | None = None) -> list[list[Tensor]]:
    """Run all passes over the parameters that each rank has rows of; return what they were handed.

    Between passes the sums of the ranks are added, or ``sums`` are given to all parameters.
    """
    handed: list[list[Tensor]] = [[]]
    for number in range(4):
        for parts in ranks:
            run_passes(number, parts, handed[-1])
        if number < 3:
            everywhere = zip(*ranks, strict=True)
            added = [sum(part.sums[number] for part in one) for one in everywhere]
            handed.append(added if sums is None else [sums[number]] * len(added))
    return handed[1:]


def run_all(parts: list[Passes], sums: list[Tensor] | None = None) -> list[Tensor]:
    """The same for one parameter."""
    return [handed for (handed,) in run_ranks([[part] for part in parts], sums)]


def cut(whole: Problem, first: int, size: int) -> Problem:
    """The rows of a parameter that a rank has, with copies of its state."""
    shape = whole.param.shape
    matrices = whole.factored and whole.state["exp_avg_sq_row"].shape[0] > 1

    def rows(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dim() or (name.endswith("_col") and not matrices):
            return tensor.clone()
        dim = 1 if name.endswith("_row") and not matrices else 0
        return tensor.narrow(dim, first, size).clone()

    offset = first * (shape[1:].numel() if len(shape) > 1 else 1)
    state = {name: rows(name, tensor) for name, tensor in whole.state.items()}
    return Problem(rows("", whole.param), state, whole.factored, whole.index, whole.offset + offset)


def cuts(rows: int) -> list[tuple[int, int]]:
    """First row and number of rows of three ranks, the last of which has none."""
    first = -(-rows * 2 // 3)
    return [(0, first), (first, rows - first), (rows, 0)]
