"""Momentum of 4, 2 and 0 bits in the CPU kernels: the bits of the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import OPEN, SHAPES, case_of, check_against_reference
from problems import assert_same_bits, make_problem, random_grad, run_ops
from strategies import DTYPES, Case, cases, kernel_isas

from came8bit import CAME
from came8bit.ops import libraries

pytestmark = [pytest.mark.kernels, pytest.mark.parametrize("bits", [4, 2, 0])]

OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "ahead": {"nesterov": True, "bias_correction": True, "stochastic": False},
    "cautious": {"cautious": True, "nesterov": True, "beta1": 0.5},
    "corrected": {"bias_correction": True, "weight_decay": 0.5, "maximize": True},
}


@settings(max_examples=100)
@given(case=cases(), steps=st.integers(1, 3))
def test_bits_of_the_reference(bits: int, case: Case, steps: int) -> None:
    check_against_reference(dataclasses.replace(case, bits=bits), steps, kernel_isas())


@pytest.mark.parametrize(("shape", "changes"), SHAPES, ids=str)
def test_bits_of_the_reference_at_edges(
    shape: tuple[int, ...], changes: dict[str, object], bits: int
) -> None:
    check_against_reference(case_of(shape, **{**changes, "bits": bits}), 3, kernel_isas())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_options(
    dtype: torch.dtype, factored: bool, options: dict[str, object], bits: int
) -> None:
    """Rows of 301 values begin in the middle of a byte where the view has batches."""
    for grad_dtype in DTYPES:
        case = case_of(
            (2, 19, 301), factored=factored, batched=factored, bits=bits, dtype=dtype,
            grad_dtype=grad_dtype, options=options,
        )  # fmt: skip
        check_against_reference(case, 2, kernel_isas())


@pytest.mark.parametrize(
    "shape", [(40, 300), (40, 384), (2, 40, 300), (40, 8), (40, 16), (300,)], ids=str
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("propagate", [True, False])
def test_values_that_are_not_finite(
    shape: tuple[int, ...], bad: float, propagate: bool, bits: int
) -> None:
    factored = len(shape) > 1
    generator = torch.Generator().manual_seed(0)
    expected = make_problem(shape, factored=factored, bits=bits, generator=generator)
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
def test_any_number_of_threads(shape: tuple[int, ...], bits: int) -> None:
    """Large enough for several tasks; a byte belongs to one of them."""
    problems = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        problem = make_problem(shape, bits=bits, generator=torch.Generator().manual_seed(0))
        for t in range(2):
            problem.run_op(random_grad(shape, torch.float32, torch.Generator().manual_seed(t)))
        problems.append(problem)
    for name, x in problems[0].tensors().items():
        for other in problems[1:]:
            assert torch.equal(x, other.tensors()[name]), name


def test_optimizers_use_them(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Without a warning, which would be an error here, and with the bits of the reference."""
    moved = []
    for by_reference in (False, True):
        params = [torch.nn.Parameter(torch.ones(64, 300)), torch.nn.Parameter(torch.ones(64))]
        optimizer = CAME(params, lr=1e-3, optim_bits=bits, nesterov=True)
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


@pytest.mark.parametrize("name", ["exp_avg", "absmax"])
def test_buffers_of_another_rung_are_refused(name: str, bits: int) -> None:
    """Scales say which it is; with buffers of two nothing is written."""
    problem, other = (
        make_problem((6, 512), bits=b, generator=torch.Generator().manual_seed(0))
        for b in (bits, {4: 2, 2: 0, 0: 4}[bits])
    )
    problem.state[name] = other.state[name]
    before = problem.copy()
    with pytest.raises(RuntimeError, match=r"exp_avg 0: expected"):
        run_ops([problem], [torch.ones(6, 512)])
    assert torch.equal(problem.param, before.param)


@pytest.mark.parametrize(
    ("shape", "factored"),
    [((150, 300), False), ((150, 384), True), ((1200, 8), True), ((600, 16), True)],
    ids=str,
)
def test_blocks_of_any_magnitude(shape: tuple[int, int], factored: bool, bits: int) -> None:
    """From subnormal numbers on, with ties, signed zeros and values in the middle of a block."""
    generator = torch.Generator().manual_seed(0)
    expected = make_problem(shape, factored=factored, bits=bits, generator=generator)
    for name in ("exp_avg_sq_row", "exp_avg_sq_col") if factored else ("exp_avg_sq",):
        expected.state[name].fill_(1.0)
    copies = {isa: expected.copy() for isa in kernel_isas()}
    magnitudes = torch.exp2(torch.arange(-149.0, 1.0))
    of_row = magnitudes.repeat_interleave(shape[0] // 150).unsqueeze(1)
    few = torch.randint(-3, 4, shape, generator=generator) / 3.0
    for grad in (few * of_row, torch.randn(shape, generator=generator) * of_row, few * of_row):
        expected.run_reference(grad, beta2=0.9999, **OPEN)
        for isa, problem in copies.items():
            libraries.set_cpu_isa(isa)
            problem.run_op(grad, beta2=0.9999, **OPEN)
            assert_same_bits(problem.tensors(), expected.tensors(), isa)
    if bits:
        assert (expected.state["absmax"].view(-1) == 0).any()
        assert expected.state["absmax"].max() > 0.01


def test_unaligned_state(bits: int) -> None:
    """Codes and scales may begin at any byte that fits their dtype, gradients at any value."""
    generator = torch.Generator().manual_seed(0)
    expected = make_problem((5, 300), bits=bits, generator=generator)
    got = expected.copy()
    for name, tensor in got.state.items():
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        got.state[name] = room[1:].view(tensor.shape).copy_(tensor)
    for t in range(2):
        grad = random_grad((5, 301), torch.float32, generator)[:, 1:]
        expected.run_reference(grad)
        got.run_op(grad)
        assert_same_bits(got.tensors(), expected.tensors(), f"step {t}")
