"""The CPU kernels have the bits of ``reference.py``, whatever the shape, the strides, the threads
and the instruction set, and they take no memory of the size of a parameter.

Every comparison is of a whole step: parameter and all state, to the last bit.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AHEAD, DENSE, OPEN, SHAPES, case_of, check_against_reference
from peak import step_peak
from problems import (
    Problem,
    assert_same_bits,
    generator,
    make_problem,
    random_grad,
    run_ops,
)
from strategies import DTYPES, LAYOUTS, Case, cases, kernel_isas, laid_out

from came8bit.ops import libraries

pytestmark = pytest.mark.kernels


# --- kernel against reference ---------------------------------------------------------------------


@settings(max_examples=150)
@given(cases(), st.integers(1, 3))
def test_bits_of_the_reference(case: Case, steps: int) -> None:
    check_against_reference(case, steps, kernel_isas())


@pytest.mark.parametrize(("shape", "changes"), SHAPES, ids=str)
def test_bits_of_the_reference_at_edges(shape: tuple[int, ...], changes: dict[str, object]) -> None:
    check_against_reference(case_of(shape, **changes), 3, kernel_isas())
    for options in (DENSE, AHEAD):
        check_against_reference(case_of(shape, **(changes | options)), 2, kernel_isas())


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("factored", [True, False])
def test_every_pair_of_dtypes(
    factored: bool, bits: int, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    case = case_of((19, 300), factored=factored, bits=bits, dtype=dtype, grad_dtype=grad_dtype)
    cautious = {"cautious": True, "stochastic": False}
    for changes in ({}, {"options": cautious}, AHEAD, DENSE):
        check_against_reference(replace(case, **changes), 2, kernel_isas())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(40, 300), (2, 40, 300), (40, 8), (40, 16), (300,)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_propagated_values(shape: tuple[int, ...], bad: float) -> None:
    """NaN and infinity go where the reference lets them go, and the code marks them."""
    factored = len(shape) > 1
    for isa in kernel_isas():
        libraries.set_cpu_isa(isa)
        for dtype in DTYPES:
            got = make_problem(
                shape, factored=factored, dtype=dtype, batched=len(shape) == 3,
                generator=generator(),
            )  # fmt: skip
            expected = got.copy()
            for t in range(3):
                grad = random_grad(shape, dtype, generator(t))
                if t == 1:
                    grad.view(-1)[[0, 299]] = bad
                got.run_op(grad, propagate=True)
                expected.run_reference(grad, propagate=True)
                assert_same_bits(got.tensors(), expected.tensors(), f"{isa} {dtype} step {t}")
            assert got.param.isnan().any()
            assert int(got.state["step"]) == 3


@pytest.mark.parametrize("cols", [8, 16])
def test_codes_of_nan_in_short_rows(cols: int) -> None:
    """A code of NaN in one row of many that go together is NaN, and only its row leaves the way."""
    for isa in kernel_isas():
        libraries.set_cpu_isa(isa)
        got = make_problem((83, cols), generator=generator())
        got.run_op(random_grad((83, cols), torch.float32, generator(1), zeros=0.0))
        for row in (5, 8, 41, 82):
            got.state["exp_avg"][row, row % cols] = -128
        expected = got.copy()
        grad = random_grad((83, cols), torch.float32, generator(2), zeros=0.0)
        got.run_op(grad, propagate=True)
        expected.run_reference(grad, propagate=True)
        assert_same_bits(got.tensors(), expected.tensors(), f"{isa} {cols}")
        assert got.param.isnan().any()


def test_gradient_of_one_value_everywhere() -> None:
    """Expanded gradients, as ``sum().backward()`` makes them, have strides of 0."""
    for shape in [(64, 300), (3, 5, 256), (70, 1)]:
        got = make_problem(shape, batched=len(shape) == 3, generator=generator())
        expected = got.copy()
        for grad in (torch.tensor(0.5), torch.randn(shape[-1], generator=generator(1))):
            got.run_op(grad.expand(shape))
            expected.run_reference(grad.expand(shape))
        assert_same_bits(got.tensors(), expected.tensors(), f"{shape}")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_memory_between_the_elements_is_not_touched(layout: str) -> None:
    """The base of a view changes where the view is, and nowhere else."""
    problem = make_problem((9, 7, 5, 33), generator=generator())
    problem.param = laid_out(problem.param, layout)
    base = problem.param if problem.param._base is None else problem.param._base
    before = base.clone()
    problem.run_op(random_grad((9, 7, 5, 33), torch.float32, generator(1), zeros=0.0))
    outside = torch.ones_like(base, dtype=torch.bool)
    inside = outside.as_strided(problem.param.shape, problem.param.stride(),
                                problem.param.storage_offset())  # fmt: skip
    inside.zero_()
    assert torch.equal(base[outside].nan_to_num(), before[outside].nan_to_num())
    assert int((base != before)[~outside].sum()) > 0.99 * problem.param.numel()


# --- threads, lists -------------------------------------------------------------------------------

# Elements below and above 65,536, where all threads begin to share a parameter of a short list; one
# and several slabs of rows and strips of 1024 columns.
THREADED: list[tuple[tuple[int, ...], dict[str, object]]] = [
    ((300, 200), {}),
    ((256, 256), {}),
    ((257, 256), {}),
    ((300, 2100), {}),
    ((4097, 65), {}),
    ((5, 20011), {}),
    ((3, 333, 300), {"batched": True}),
    ((65536,), {"factored": False, "bits": 32}),
    ((200_001,), {"factored": False, "bits": 32}),
    ((999, 256), {"factored": False}),
]


@pytest.mark.parametrize(
    ("dtype", "cautious"), [(torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, cautious: bool, isa: str) -> None:
    """A whole list at once, so that threads also share out the small parameters; of a list eight
    times as long also the medium ones.
    """
    kinds: dict[object, list[Problem]] = {}
    for i, (shape, changes) in enumerate(THREADED):
        problem = make_problem(shape, dtype=dtype, index=i, generator=generator(i), **changes)  # type: ignore[arg-type]
        kinds.setdefault((problem.factored, "absmax" in problem.state), []).append(problem)
    for problems in kinds.values():
        steps = [
            [random_grad(p.param.shape, dtype, generator(t)) for p in problems] for t in range(2)
        ]
        expected: list[Problem] = []
        for threads, times in ((1, 1), (2, 1), (3, 1), (5, 1), (2, 8)):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            got = [p.copy() for _ in range(times) for p in problems]
            for grads in steps:
                run_ops(got, grads * times, cautious=cautious)
            expected = expected or got
            for mine, other in zip(got, expected * times, strict=True):
                what = f"{isa}, {threads} threads, {times} times {tuple(mine.param.shape)}"
                assert_same_bits(mine.tensors(), other.tensors(), what)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(700, 1100), (3, 333, 300), (200_001,)], ids=str)
def test_large_parameters_have_the_bits_of_the_reference(
    shape: tuple[int, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    changes = {"factored": len(shape) > 1, "batched": len(shape) == 3}
    case = case_of(shape, dtype=torch.bfloat16, grad_dtype=torch.bfloat16, **changes)
    check_against_reference(case, 2, kernel_isas()[-1:])


def test_a_list_is_its_members() -> None:
    """Parameters of one call neither depend on each other nor on their order."""
    alone = [
        make_problem(shape, dtype=dtype, index=i, generator=generator(i))
        for i, (shape, dtype) in enumerate(
            (shape, dtype)
            for shape in [(64, 96), (300, 400), (1, 5), (2, 3), (257, 33)]
            for dtype in DTYPES
        )
    ]
    together = [p.copy() for p in alone]
    reverse = [p.copy() for p in alone]
    for t in range(2):
        grads = [random_grad(p.param.shape, torch.float32, generator(t)) for p in alone]
        for problem, grad in zip(alone, grads, strict=True):
            problem.run_op(grad)
        run_ops(together, grads)
        run_ops(reverse[::-1], grads[::-1])
    for mine, other, third in zip(alone, together, reverse, strict=True):
        assert_same_bits(other.tensors(), mine.tensors(), "together")
        assert_same_bits(third.tensors(), mine.tensors(), "in reverse order")


# --- random bits, lr, floating-point environment --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("begin", "end"), [(0, 20), (20, 41), (41, 64)])
def test_a_row_shard_draws_what_the_whole_parameter_draws(
    dtype: torch.dtype, begin: int, end: int
) -> None:
    whole = make_problem((64, 301), factored=False, dtype=dtype, generator=generator())
    shard = make_problem(
        (end - begin, 301), factored=False, dtype=dtype, offset=begin * 301, generator=generator()
    )
    shard.param.copy_(whole.param[begin:end])
    for t in range(3):
        grad = random_grad((64, 301), dtype, generator(t))
        whole.run_op(grad, **OPEN)
        shard.run_op(grad[begin:end], **OPEN)
    for name in ("param", "exp_avg", "absmax", "exp_avg_sq"):
        got, expected = shard.tensors()[name], whole.tensors()[name][begin:end]
        assert torch.equal(got, expected), name
    # And the draw does depend on where the element is.
    elsewhere = whole.copy()
    elsewhere.offset = 8
    for problem in (whole, elsewhere):
        problem.run_op(grad, **OPEN)
    assert not torch.equal(whole.param, elsewhere.param)


@pytest.mark.parametrize("before", [8, 72, 200, 256])
def test_counters_grow_beyond_32_bits(before: int) -> None:
    """The upper word of a counter, which eight elements share, is drawn with, too."""
    for isa in kernel_isas():
        libraries.set_cpu_isa(isa)
        got = make_problem(
            (2, 300), dtype=torch.bfloat16, offset=2**35 - before, generator=generator()
        )
        expected = got.copy()
        grad = random_grad((2, 300), torch.bfloat16, generator(1))
        got.run_op(grad)
        expected.run_reference(grad)
        assert_same_bits(got.tensors(), expected.tensors(), f"{isa}, {before}")


@pytest.mark.parametrize("what", ["index", "seed", "step"])
def test_every_word_of_the_counter_matters(what: str) -> None:
    """Same gradient, same statistics, other bits."""
    base = make_problem((64, 300), dtype=torch.bfloat16, generator=generator())
    other = base.copy()
    options: dict[str, object] = {}
    if what == "index":
        other.index = 4
    if what == "seed":
        options = {"seed": 1}
    if what == "step":
        other.state["step"] += 1
    grad = random_grad((64, 300), torch.bfloat16, generator(1))
    base.run_op(grad)
    other.run_op(grad, **options)
    assert torch.equal(base.state["exp_avg"], other.state["exp_avg"])
    share = (base.param != other.param).double().mean().item()
    assert 0.05 < share < 0.5


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.0])
def test_tensor_lr(factored: bool, lr: float) -> None:
    """A tensor takes the place of the number; its product with weight decay is formed in fp32."""
    got = make_problem((40, 300), factored=factored, generator=generator())
    expected, number = got.copy(), got.copy()
    tensor = torch.tensor(lr)
    for t in range(2):
        grad = random_grad((40, 300), torch.float32, generator(t))
        got.run_op(grad, lr_tensor=tensor, lr=7.0, weight_decay=0.1)
        expected.run_reference(grad, lr_tensor=tensor, lr=7.0, weight_decay=0.1)
        # 0.1 in fp32 is not 0.1: the number that gives the same product, made in float64
        decay = (tensor * torch.tensor(0.1)).item() / tensor.item() if lr else 0.0
        number.run_op(grad, lr=tensor.item(), weight_decay=decay)
    assert_same_bits(got.tensors(), expected.tensors(), "reference")
    assert_same_bits(got.tensors(), number.tensors(), "number")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(64, 300), (300, 400)], ids=str)
@pytest.mark.parametrize("eps1", [1e-30, 1e-44])
def test_flushing_of_subnormals_does_not_reach_the_kernels(
    eps1: float, shape: tuple[int, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    fresh = make_problem(shape, generator=generator())
    grads = [random_grad(shape, torch.float32, generator(t)) * 1e-20 for t in range(2)]
    runs = {}
    assert torch.set_flush_denormal(False)
    for flush in (False, True):
        for name in ("run_op", "run_reference"):
            problem = fresh.copy()
            try:
                if flush and not torch.set_flush_denormal(True):
                    pytest.skip("this processor cannot flush subnormals")
                for grad in grads:
                    getattr(problem, name)(grad, eps1=eps1)
                if flush:  # and the setting is still the caller's afterwards
                    assert (torch.tensor([1e-20]) * 1e-20).item() == 0.0
            finally:
                torch.set_flush_denormal(False)
            runs[name, flush] = problem.tensors()
    assert_same_bits(runs["run_op", False], runs["run_reference", False], "without flushing")
    assert_same_bits(runs["run_op", True], runs["run_op", False], "with flushing")
    # eager PyTorch does flush: the gradients were small enough to tell
    with pytest.raises(AssertionError):
        assert_same_bits(runs["run_reference", True], runs["run_op", True], "reference")


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("shape", [(40, 300), (300, 400)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("where", [0, -1, 5000])
def test_skipped_parameters_are_left_alone(
    factored: bool, shape: tuple[int, ...], bad: float, where: int
) -> None:
    """Nothing but the counter changes; the next parameter of the call goes on."""
    problems = [make_problem(shape, factored=factored, generator=generator(i)) for i in range(2)]
    grads = [random_grad(shape, torch.float32, generator(i)) for i in range(2)]
    run_ops(problems, grads)
    before, other = problems[0].copy(), problems[1].copy()
    poisoned = grads[0].clone()
    poisoned.view(-1)[where] = bad
    run_ops(problems, [poisoned, grads[1]])
    other.run_op(grads[1])
    before.state["skipped"] += 1
    assert_same_bits(problems[0].tensors(), before.tensors(), "skipped")
    assert_same_bits(problems[1].tensors(), other.tensors(), "its neighbour")
    assert int(problems[1].state["step"]) == 2


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("shape", [(40, 300), (300, 400)], ids=str)
def test_update_that_is_not_finite_is_skipped(factored: bool, shape: tuple[int, ...]) -> None:
    """The second look, at u: a damaged statistic does not reach the parameter either."""
    got = make_problem(shape, factored=factored, generator=generator())
    got.run_op(random_grad(shape, torch.float32, generator()))
    got.state["exp_avg_sq_col" if factored else "exp_avg_sq"].view(-1)[7] = -1.0
    before, expected = got.copy(), got.copy()
    grad = random_grad(shape, torch.float32, generator(1), zeros=0.0)
    got.run_op(grad)
    expected.run_reference(grad)
    before.state["skipped"] += 1
    assert_same_bits(got.tensors(), before.tensors(), "skipped")
    assert_same_bits(expected.tensors(), before.tensors(), "the reference, too")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("shapes", "dtype", "transposed", "options"),
    [
        ([[768, 50257]], "bfloat16", False, {}),
        ([[50257, 768]], "bfloat16", True, {"cautious": True}),
        ([[2048, 1024]] * 4 + [[64, 64]] * 200, "float32", False, {"nonfinite": "raise"}),
    ],
    ids=["768x50257", "768x50257-transposed", "many"],
)
def test_a_step_takes_no_memory_of_the_size_of_a_parameter(
    shapes: list[list[int]], dtype: str, transposed: bool, options: dict[str, object]
) -> None:
    extra, nbytes = step_peak(shapes, dtype, transposed=transposed, **options)
    assert extra <= tolerances.STEP_EXTRA_FRACTION * nbytes + tolerances.STEP_EXTRA_BYTES
