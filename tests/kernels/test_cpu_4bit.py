"""4-bit momentum in the CPU kernels: the bits of the reference, and what no kernel has."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SHAPES, case_of, check_against_reference
from problems import assert_same_bits, make_problem, random_grad, run_ops
from strategies import DTYPES, Case, cases, kernel_isas

from came8bit import CAME
from came8bit.ops import libraries

pytestmark = pytest.mark.kernels

OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "ahead": {"nesterov": True, "bias_correction": True, "stochastic": False},
    "cautious": {"cautious": True, "nesterov": True, "beta1": 0.5},
    "corrected": {"bias_correction": True, "weight_decay": 0.5, "maximize": True},
}


@settings(max_examples=100)
@given(cases(), st.integers(1, 3))
def test_bits_of_the_reference(case: Case, steps: int) -> None:
    check_against_reference(dataclasses.replace(case, bits=4), steps, kernel_isas())


@pytest.mark.parametrize(("shape", "changes"), SHAPES, ids=str)
def test_bits_of_the_reference_at_edges(shape: tuple[int, ...], changes: dict[str, object]) -> None:
    check_against_reference(case_of(shape, **{**changes, "bits": 4}), 3, kernel_isas())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_options(dtype: torch.dtype, factored: bool, options: dict[str, object]) -> None:
    """Rows of 301 values begin in the middle of a byte where the view has batches."""
    for grad_dtype in DTYPES:
        case = case_of(
            (2, 19, 301), factored=factored, batched=factored, bits=4, dtype=dtype,
            grad_dtype=grad_dtype, options=options,
        )  # fmt: skip
        check_against_reference(case, 2, kernel_isas())


@pytest.mark.parametrize("shape", [(40, 300), (2, 40, 300), (300,)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("propagate", [True, False])
def test_values_that_are_not_finite(shape: tuple[int, ...], bad: float, propagate: bool) -> None:
    factored = len(shape) > 1
    generator = torch.Generator().manual_seed(0)
    expected = make_problem(shape, factored=factored, bits=4, generator=generator)
    got = expected.copy()
    for t in range(3):
        grad = random_grad(shape, torch.float32, generator)
        if t == 1:
            grad.view(-1)[7] = bad
        expected.run_reference(grad, propagate=propagate)
        got.run_op(grad, propagate=propagate)
        assert_same_bits(got.tensors(), expected.tensors(), f"step {t}")
    assert int(got.state["skipped"]) == (0 if propagate else 1)


@pytest.mark.parametrize("shape", [(257, 1300), (3, 200_001)], ids=str)
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Large enough for several tasks; a byte belongs to one of them."""
    problems = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        problem = make_problem(shape, bits=4, generator=torch.Generator().manual_seed(0))
        for t in range(2):
            problem.run_op(random_grad(shape, torch.float32, torch.Generator().manual_seed(t)))
        problems.append(problem)
    for name, x in problems[0].tensors().items():
        assert torch.equal(x, problems[1].tensors()[name]), name


def test_optimizers_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, which would be an error here, and with the bits of the reference."""
    moved = []
    for by_reference in (False, True):
        params = [torch.nn.Parameter(torch.ones(64, 300)), torch.nn.Parameter(torch.ones(64))]
        optimizer = CAME(params, lr=1e-3, optim_bits=4, nesterov=True)
        if by_reference:
            monkeypatch.setattr(libraries, "needs_reference", lambda options, device: True)
        for t in range(3):
            for param in params:
                generator = torch.Generator().manual_seed(t)
                param.grad = random_grad(tuple(param.shape), torch.float32, generator)
            optimizer.step()
        moved.append(params)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8
    for got, expected in zip(*moved, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(6, 512), (6, 1)], ids=str)
def test_2_bits_are_refused(shape: tuple[int, ...]) -> None:
    """The kernels do not have them: they must not be taken for 4."""
    problem = make_problem(shape, bits=2, generator=torch.Generator().manual_seed(0))
    before = problem.copy()
    with pytest.raises(RuntimeError, match=r"(exp_avg|absmax) 0: expected"):
        run_ops([problem], [torch.ones(shape)])
    assert torch.equal(problem.param, before.param)
