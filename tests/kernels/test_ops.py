"""The operators as PyTorch sees them: schemas, fakes, compilation."""

from __future__ import annotations

import pytest
import torch
from passes import CASES, KINDS, Passes, pass_arguments, run_passes
from problems import (
    Problem,
    arguments_of,
    assert_same_bits,
    generator,
    make_problem,
    operator_of,
    random_grad,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from came8bit import CAME8bit
from came8bit.ops import schema
from came8bit.reference.quant import absmax_shape

STEPS = {
    "factored, 8 bits": dict(shape=(40, 300)),
    "factored, 32 bits": dict(shape=(40, 300), bits=32),
    "batched": dict(shape=(2, 20, 300), batched=True),
    "unfactored, 8 bits": dict(shape=(40, 300), factored=False),
    "unfactored, 32 bits": dict(shape=(700,), factored=False, bits=32),
}


def problems_of(kind: str, dtype: torch.dtype = torch.float32) -> list[Problem]:
    return [
        make_problem(dtype=dtype, index=i, generator=generator(i), **STEPS[kind])  # type: ignore[arg-type]
        for i in range(2)
    ]


# --- opcheck --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_opcheck_of_the_steps(kind: str, dtype: torch.dtype, tensor_lr: bool) -> None:
    problems = problems_of(kind, dtype)
    grads = [random_grad(p.param.shape, dtype, generator()) for p in problems]
    lr = torch.tensor(1e-3) if tensor_lr else None
    arguments = arguments_of(problems, grads, lr_tensor=lr)
    torch.library.opcheck(operator_of(problems), (), arguments)
    torch.library.opcheck(operator_of(problems), tuple(arguments.values()))  # the order, too


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_opcheck_of_the_passes(kind: str, options: dict[str, object]) -> None:
    """One after another, since each needs what the one before has left."""
    problems = [
        make_problem(dtype=torch.bfloat16, index=i, generator=generator(i), **KINDS[kind])
        for i in range(2)
    ]
    grads = [random_grad(p.param.shape, torch.bfloat16, generator(9)) for p in problems]
    parts = [Passes(p, p, g, None, options) for p, g in zip(problems, grads, strict=True)]
    reduced: list[Tensor] = []
    for number, operator in enumerate(schema.PASSES[operator_of(problems)]):
        arguments = pass_arguments(number, parts, reduced)
        torch.library.opcheck(operator, (), arguments)
        order = [argument.name for argument in operator._schema.arguments]
        torch.library.opcheck(operator, tuple(arguments[name] for name in order))
        run_passes(number, parts, reduced)
        reduced = [part.sums[number] for part in parts] if number < 3 else []
    assert all(int(problem.state["step"]) == 1 for problem in problems)


@pytest.mark.parametrize("shape", [(), (300,), (3, 300), (2, 3, 5, 7), (0, 4)], ids=str)
def test_opcheck_of_the_codec(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator())
    torch.library.opcheck(schema.quantize_blockwise, (x,))
    torch.library.opcheck(schema.dequantize_blockwise, schema.quantize_blockwise(x))


# --- fake tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (300,), (3, 300), (2, 3, 5, 7)], ids=str)
def test_fake_codec_has_the_real_shapes(shape: tuple[int, ...]) -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(shape))
        codes, absmax = schema.quantize_blockwise(x)
        back = schema.dequantize_blockwise(codes, absmax)
    assert (codes.dtype, codes.shape) == (torch.int8, shape)
    assert (absmax.dtype, absmax.shape) == (torch.float32, absmax_shape(shape))
    assert (back.dtype, back.shape) == (torch.float32, shape)


@pytest.mark.parametrize("fake", [False, True])
def test_codec_refuses_other_dtypes(fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        with pytest.raises((RuntimeError, TypeError), match=r"expected torch\.float32; cast first"):
            schema.quantize_blockwise(torch.ones(3, dtype=torch.float64))
        with pytest.raises((RuntimeError, TypeError), match=r"expected .*torch\.int8"):
            schema.dequantize_blockwise(torch.ones(3), torch.ones(1, 1))


def test_fake_step_counts_the_gradients() -> None:
    problems = problems_of("factored, 8 bits")
    named = arguments_of(problems, [torch.ones(40, 300)])
    message = "got 1 gradients for 2 parameters"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        schema.factored_step_(**named)


def test_fake_step_changes_nothing() -> None:
    problems = problems_of("factored, 8 bits")
    before = [p.copy() for p in problems]
    with FakeTensorMode() as mode:
        fakes = {
            name: [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in value]
            if isinstance(value, list)
            else value
            for name, value in arguments_of(problems, [torch.ones(40, 300)] * 2).items()
        }
        assert schema.factored_step_(**fakes) is None
    for got, expected in zip(problems, before, strict=True):
        assert_same_bits(got.tensors(), expected.tensors(), "after a fake step")


# --- compilation, autograd ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STEPS)
def test_compiled_steps_have_the_same_bits(kind: str) -> None:
    """One graph, what is written in place included; the gradient is made in the graph."""
    eager, compiled = problems_of(kind, torch.bfloat16), problems_of(kind, torch.bfloat16)
    operator = operator_of(eager)

    def train(problems: list[Problem], grads: list[Tensor]) -> None:
        scaled = [g * 2.0 for g in grads]
        operator(**arguments_of(problems, scaled))

    def compiled_train(grads: list[Tensor]) -> None:
        train(compiled, grads)

    torch._dynamo.reset()
    fast = torch.compile(compiled_train, fullgraph=True, backend="aot_eager")
    for t in range(2):
        grads = [random_grad(p.param.shape, torch.bfloat16, generator(t)) for p in eager]
        train(eager, grads)
        fast(grads)
    for got, expected in zip(compiled, eager, strict=True):
        assert_same_bits(got.tensors(), expected.tensors(), kind)
        assert int(got.state["step"]) == 2


def test_steps_work_on_parameters_that_require_grad() -> None:
    """Under ``no_grad``, as optimizers call them."""
    (problem, _) = problems_of("factored, 8 bits")
    expected = problem.copy()
    problem.param = torch.nn.Parameter(problem.param)
    grad = random_grad((40, 300), torch.float32, generator())
    with torch.no_grad():
        problem.run_op(grad)
    expected.run_op(grad)
    assert problem.param.requires_grad
    assert torch.equal(problem.param, expected.param)


@pytest.mark.parametrize("shape", [(40, 300), (300,)], ids=str)
def test_stale_graphs_notice_the_step(shape: tuple[int, ...]) -> None:
    """Backward through weights that a step has changed in place is an error, not a wrong number."""
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator()))
    optimizer = CAME8bit([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones(shape)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
