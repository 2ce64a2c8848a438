"""A step pass by pass: the bits of a whole step, and of a shard those of the whole parameter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from problems import (
    Problem,
    arguments_of,
    assert_same_bits,
    make_problem,
    operator_of,
    random_grad,
)
from torch import Tensor

from came8bit import reference
from came8bit.ops import schema

KINDS = {
    "8 bits": dict(shape=(37, 300)),
    "4 bits": dict(shape=(37, 301), bits=4),
    "2 bits": dict(shape=(37, 301), bits=2),
    "32 bits": dict(shape=(70, 1100), bits=32),
    "matrices": dict(shape=(6, 20, 300), batched=True),
    "convolution": dict(shape=(37, 12, 3, 3)),
    "unfactored": dict(shape=(37, 300), factored=False),
    "vector": dict(shape=(701,), factored=False, bits=32),
}
OPTIONS = (
    {},
    dict(cautious=True, nesterov=True, bias_correction=True),
    dict(maximize=True, clip_threshold=0.3),
)
CASES = [(kind, OPTIONS[i % 3]) for i, kind in enumerate(KINDS)]
by_kernel_too = pytest.mark.parametrize("by_reference", [True, False], ids=["reference", "op"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Passes:
    """The passes over one parameter, of which this rank may have some rows."""

    def __init__(self, whole: Problem, part: Problem, grad: Tensor, by_reference: bool, options):
        self.problem, self.by_reference = part, by_reference
        b, n = whole.state["exp_avg_sq_row"].shape if whole.factored else (1, 0)
        k = whole.state["exp_avg_sq_col"].shape[1] if whole.factored else 0
        rows = n if whole.factored and b == 1 else 0
        columns = (k if rows else 0) if whole.factored else -1
        sizes = reference.sums_sizes(columns, options.get("cautious", False))
        self.sums = [torch.full((size,), torch.nan, dtype=torch.float64) for size in sizes]
        state = part.state
        own = (*state["exp_avg_sq_row"].shape, k) if part.factored else (0, 0, 0)
        self.arguments = {
            **arguments_of([part], [grad], **options),
            "full_numel": [whole.param.numel()],
            "full_rows": [rows],
            "work": [torch.full((reference.work_size(*own),), torch.nan)],
        }

    def run(self, number: int, reduced: Tensor | None) -> None:
        operator = schema.PASSES[operator_of([self.problem])][number]
        if self.by_reference:
            operator = schema.BY_REFERENCE[operator]
        after = [self.sums[number]] if number < 3 else []
        operator(**self.arguments, reduced=[] if reduced is None else [reduced], sums=after)


def run_all(parts: list[Passes], sums: list[Tensor] | None = None) -> list[Tensor]:
    """Run all passes; between them parts are added, or ``sums`` are given to all."""
    reduced: list[Tensor | None] = [None]
    for number in range(4):
        for part in parts:
            part.run(number, reduced[-1])
        if number < 3:
            added = sum(part.sums[number] for part in parts)
            reduced.append(added if sums is None else sums[number])
    return [x for x in reduced if x is not None]


def cut(whole: Problem, first: int, size: int) -> Problem:
    """The rows of a parameter that a rank has, with copies of its state."""
    shape = whole.param.shape
    matrices = whole.factored and whole.state["exp_avg_sq_row"].shape[0] == shape[0]

    def rows(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dim() or (name.endswith("_col") and not matrices):
            return tensor.clone()
        dim = 1 if name.endswith("_row") and not matrices else 0
        return tensor.narrow(dim, first, size).clone()

    offset = first * (shape[1:].numel() if len(shape) > 1 else 1)
    state = {name: rows(name, tensor) for name, tensor in whole.state.items()}
    return Problem(rows("", whole.param), state, whole.factored, whole.index, offset)


def steps(whole: Problem, dtype: torch.dtype, count: int = 3) -> Iterator[Tensor]:
    for t in range(count):
        yield random_grad(whole.param.shape, dtype, generator(t)) * 10.0**t


@by_kernel_too
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_passes_make_a_step(kind, options, by_reference):
    got = make_problem(dtype=torch.bfloat16, generator=generator(), **KINDS[kind])
    expected = got.copy()
    for grad in steps(got, torch.bfloat16):
        run_all([Passes(got, got, grad, by_reference, options)])
        expected.run_reference(grad, **options)
        assert_same_bits(got.tensors(), expected.tensors(), kind)


@by_kernel_too
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_shards_have_the_bits_of_the_whole_given_its_sums(kind, options, by_reference):
    """Rounding is stochastic: it draws the bits of the place in the full parameter."""
    whole = make_problem(dtype=torch.bfloat16, generator=generator(1), **KINDS[kind])
    size = -(-whole.param.shape[0] // 3)
    cuts = [(first, min(size, whole.param.shape[0] - first)) for first in (0, size, 2 * size)]
    parts = [cut(whole, *where) for where in [*cuts, (whole.param.shape[0], 0)]]
    for grad in steps(whole, torch.float32):
        sums = run_all([Passes(whole, whole, grad, True, options)])
        grads = [*(grad.narrow(0, *where) for where in cuts), grad[:0]]
        split = [
            Passes(whole, part, g, by_reference, options)
            for part, g in zip(parts, grads, strict=True)
        ]
        run_all(split, sums)
        # Sums of different rows in a different order: close, and not what is compared below.
        for number in range(3):
            torch.testing.assert_close(
                sum(part.sums[number] for part in split), sums[number], rtol=2e-6, atol=1e-30
            )
        for part, where in zip(parts, [*cuts, (whole.param.shape[0], 0)], strict=True):
            assert_same_bits(part.tensors(), cut(whole, *where).tensors(), f"{kind} {where}")


@by_kernel_too
@pytest.mark.parametrize("bad", [torch.nan, 1e30], ids=str)
@pytest.mark.parametrize("kind", ["8 bits", "matrices", "unfactored"])
def test_a_shard_that_is_not_finite_skips_all(kind, bad, by_reference):
    whole = make_problem(generator=generator(2), **KINDS[kind])
    half = whole.param.shape[0] // 2
    where = [(0, half), (half, whole.param.shape[0] - half)]
    parts = [cut(whole, *w) for w in where]
    before = [part.copy() for part in parts]
    grad = random_grad(whole.param.shape, torch.float32, generator(3))
    grad.view(-1)[-1] = bad
    run_all(
        [
            Passes(whole, part, grad.narrow(0, *w), by_reference, {"cautious": True})
            for part, w in zip(parts, where, strict=True)
        ]
    )
    for part, old in zip(parts, before, strict=True):
        assert part.state["skipped"] == 1
        part.state["skipped"].zero_()
        assert_same_bits(part.tensors(), old.tensors(), kind)
