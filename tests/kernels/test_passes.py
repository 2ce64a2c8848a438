"""A step pass by pass: the bits of a whole step, and of a shard those of the whole parameter.

By the reference, by the kernels of the CPU, and by those of CUDA on the shim (``tests/shim``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from passes import CASES, KINDS, Passes, cut, cuts, run_all
from problems import Problem, assert_same_bits, generator, make_problem, random_grad
from shim.cases import SHIM_TREE
from shim.library import kernels, plain
from torch import Tensor

from came8bit.reference.reduction import CPU_TREE, Tree


@dataclass(frozen=True)
class Way:
    """How the passes are run: ``tree`` is of their sums, ``run`` that of :class:`Passes`."""

    tree: Tree
    run: Tree | None


@pytest.fixture(params=["reference", "CPU", "CUDA"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    if request.param != "CUDA":
        yield Way(CPU_TREE, CPU_TREE if request.param == "reference" else None)
        return
    if sys.platform != "linux":
        pytest.skip("the shim is made for Linux")
    plain().configure()
    with kernels():
        yield Way(SHIM_TREE, None)


def steps(whole: Problem, dtype: torch.dtype, count: int = 3) -> Iterator[Tensor]:
    for t in range(count):
        yield random_grad(whole.param.shape, dtype, generator(t)) * 10.0**t


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_passes_make_a_step(kind: str, options: dict, way: Way) -> None:
    got = make_problem(dtype=torch.bfloat16, generator=generator(), **KINDS[kind])
    expected = got.copy()
    for grad in steps(got, torch.bfloat16):
        run_all([Passes(got, got, grad, way.run, options)])
        expected.run_reference(grad, way.tree, **options)
        assert_same_bits(got.tensors(), expected.tensors(), kind)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_shards_have_the_bits_of_the_whole_given_its_sums(
    kind: str, options: dict, way: Way
) -> None:
    """Rounding is stochastic: it draws the bits of the place in the full parameter."""
    whole = make_problem(dtype=torch.bfloat16, generator=generator(1), **KINDS[kind])
    where = cuts(whole.param.shape[0])
    parts = [cut(whole, *rows) for rows in where]
    for grad in steps(whole, torch.float32):
        sums = run_all([Passes(whole, whole, grad, way.tree, options)])
        split = [
            Passes(whole, part, grad.narrow(0, *rows), way.run, options)
            for part, rows in zip(parts, where, strict=True)
        ]
        run_all(split, sums)
        # Sums of different rows in a different order: close, and not what is compared below.
        for number in range(3):
            torch.testing.assert_close(
                sum(part.sums[number] for part in split), sums[number], rtol=2e-6, atol=1e-30
            )
        for part, rows in zip(parts, where, strict=True):
            assert_same_bits(part.tensors(), cut(whole, *rows).tensors(), f"{kind} {rows}")


@pytest.mark.parametrize("bad", [torch.nan, 1e30], ids=str)
@pytest.mark.parametrize("kind", ["8 bits", "matrices", "unfactored"])
def test_a_shard_that_is_not_finite_skips_all(kind: str, bad: float, way: Way) -> None:
    whole = make_problem(generator=generator(2), **KINDS[kind])
    half = whole.param.shape[0] // 2
    where = [(0, half), (half, whole.param.shape[0] - half)]
    parts = [cut(whole, *w) for w in where]
    before = [part.copy() for part in parts]
    grad = random_grad(whole.param.shape, torch.float32, generator(3))
    grad.view(-1)[-1] = bad
    passes = [
        Passes(whole, part, grad.narrow(0, *w), way.run, {"cautious": True})
        for part, w in zip(parts, where, strict=True)
    ]
    sums = run_all(passes)
    for number in (1, 2):
        assert torch.equal(sums[number], torch.zeros_like(sums[number]))
    for part, old in zip(parts, before, strict=True):
        assert part.state["skipped"] == 1
        part.state["skipped"].zero_()
        assert_same_bits(part.tensors(), old.tensors(), kind)


@pytest.mark.parametrize("kind", ["8 bits", "matrices", "unfactored"])
def test_u_that_is_not_finite_skips_all(kind: str, way: Way) -> None:
    """The gradient is finite, the preconditioned one is not: known when the third pass begins."""
    problem = make_problem(generator=generator(4), **KINDS[kind])
    before = problem.copy()
    options = {"beta2": 0.0, "eps1": 0.0, "cautious": True}
    passes = Passes(problem, problem, torch.full(problem.param.shape, 1e-30), way.run, options)
    sums = run_all([passes])
    assert torch.equal(sums[2], torch.zeros_like(sums[2]))
    assert problem.state["skipped"] == 1
    problem.state["skipped"].zero_()
    assert_same_bits(problem.tensors(), before.tensors(), kind)
