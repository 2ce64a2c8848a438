"""The CUDA kernels on a GPU have the bits of ``reference.py`` with the sums of ``CUDA_TREE``.

Every comparison is of whole steps: parameter and all state, to the last bit. The reference runs on
the CPU. ``test_cuda_device.py`` has what is about the device itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import OPEN, SHAPES, case_of
from on_gpu import (
    DEVICE,
    TREE,
    check_kernels,
    check_step,
    gpu_operators,
    needs_gpu,
    on_gpu,
    step,
    to_gpu,
)
from passes import CASES as PASSES
from passes import KINDS, Passes, cut, cuts, run_passes
from problems import assert_same_bits, generator, make_problem, near_code_edges, random_grad
from shim.cases import CASES, GROUP, SMALL, ListCase
from strategies import DTYPES, Case, cases

from came8bit.ops import schema
from came8bit.reference import quant

pytestmark = [pytest.mark.cuda, needs_gpu]


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_loaded() -> None:
    check_kernels()


@pytest.fixture(params=["sweeps", "small"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three sweeps for every parameter, or one block for each."""
    monkeypatch.setenv(SMALL, "0" if request.param == "sweeps" else str(2**40))
    name: str = request.param
    return name


def check_case(case: Case, steps: int) -> None:
    expected = case.problem()
    got = to_gpu(expected)
    for t, grad in enumerate(case.grads(steps), 1):
        check_step([got], [expected], [grad], f"step {t}, {case}", **case.options)


# --- kernel against reference ---------------------------------------------------------------------


@pytest.mark.parametrize("group_bytes", ["1", "5000", ""])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lists(
    case: ListCase, path: str, group_bytes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parameters in a call, in one group or in many."""
    monkeypatch.setenv(GROUP, group_bytes)
    expected = case.problems()
    got = [to_gpu(problem) for problem in expected]
    for t in range(case.steps):
        what = f"{case.name}, {path}, step {t}"
        check_step(got, expected, case.grads(t), what, **case.options)


@settings(max_examples=100)
@given(cases(), st.integers(1, 3))
def test_bits_of_the_reference(case: Case, steps: int) -> None:
    check_case(case, steps)


@pytest.mark.parametrize(("shape", "changes"), SHAPES, ids=str)
def test_bits_of_the_reference_at_edges(
    shape: tuple[int, ...], changes: dict[str, object], path: str
) -> None:
    check_case(case_of(shape, **changes), 2)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8, 4, 2, 0])
@pytest.mark.parametrize("factored", [True, False])
def test_every_pair_of_dtypes(
    factored: bool, bits: int, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    for shape in ((19, 300), (40, 256)):
        case = case_of(shape, factored=factored, bits=bits, dtype=dtype, grad_dtype=grad_dtype)
        cautious = {"cautious": True, "stochastic": False}
        check_case(case, 2)
        check_case(case_of(**{**vars(case), "options": cautious}), 2)


# Many slabs, strips and tiles, so that blocks of every phase run side by side.
LARGE: list[tuple[tuple[int, ...], dict[str, object]]] = [
    ((1500, 3000), {}),
    ((3000, 1504), {}),
    ((20_011, 96), {}),
    ((96, 20_016), {}),
    ((5, 300, 520), {"batched": True}),
    ((1_000_003,), {"factored": False, "bits": 32}),
    ((4000, 264), {"factored": False}),
    ((1500, 3000), {"bits": 4}),
    ((96, 20_016), {"bits": 2}),
    ((5, 300, 520), {"batched": True, "bits": 4}),
    ((9, 300, 640), {"batched": True, "bits": 2}),
    ((4000, 264), {"factored": False, "bits": 2}),
    ((1500, 3000), {"bits": 0}),
]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("shape", "changes"), LARGE, ids=str)
def test_large_parameters(
    shape: tuple[int, ...], changes: dict[str, object], cautious: bool
) -> None:
    bf16 = {"dtype": torch.bfloat16, "grad_dtype": torch.bfloat16}
    check_case(case_of(shape, **bf16, **changes, options={"cautious": cautious}), 2)


def test_gradient_of_one_value_everywhere() -> None:
    """Expanded gradients have strides of 0."""
    for shape in [(64, 300), (3, 5, 256), (70, 1)]:
        expected = make_problem(shape, batched=len(shape) == 3, generator=generator())
        got = to_gpu(expected)
        for grad in (torch.tensor(0.5), torch.randn(shape[-1], generator=generator(1))):
            check_step([got], [expected], [grad.expand(shape)], f"{shape}")


@pytest.mark.parametrize(("kind", "options"), PASSES, ids=str)
def test_passes_over_the_rows_of_several_ranks(kind: str, options: dict[str, object]) -> None:
    """After each pass; the sums of three ranks are added in between."""
    whole = make_problem(dtype=torch.bfloat16, generator=generator(), **KINDS[kind])
    where = cuts(whole.param.shape[0])
    expected = [cut(whole, *rows) for rows in where]
    got = [to_gpu(part) for part in expected]
    for t in range(3):
        grads = [random_grad(whole.param.shape, torch.float32, generator(t)).narrow(0, *rows)
                 for rows in where]  # fmt: skip
        mine = [
            Passes(whole, *both, None, options)
            for both in zip(got, map(on_gpu, grads), strict=True)
        ]
        others = [Passes(whole, *both, TREE, options) for both in zip(expected, grads, strict=True)]
        reduced: list[torch.Tensor] = []
        for number in range(4):
            for a, b in zip(mine, others, strict=True):
                with gpu_operators():
                    run_passes(number, [a], [on_gpu(sums) for sums in reduced])
                run_passes(number, [b], reduced)
                found = {name: x.cpu() for name, x in a.outcome(number).items()}
                assert_same_bits(found, b.outcome(number), f"{kind}, step {t}, pass {number}")
            if number < 3:
                reduced = [torch.stack([b.sums[number] for b in others]).sum(0)]


# --- random bits and lr ---------------------------------------------------------------------------


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
    mine, part = to_gpu(whole), to_gpu(shard)
    for t in range(3):
        grad = random_grad((64, 301), dtype, generator(t))
        step([mine], [grad], **OPEN)
        step([part], [grad[begin:end].clone()], **OPEN)
    for name in ("param", "exp_avg", "absmax", "exp_avg_sq"):
        assert torch.equal(part.tensors()[name], mine.tensors()[name][begin:end]), name


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.0])
def test_lr_in_a_tensor(factored: bool, lr: float) -> None:
    expected = make_problem((40, 300), factored=factored, generator=generator())
    got = to_gpu(expected)
    options = {"lr_tensor": torch.tensor(lr), "lr": 7.0, "weight_decay": 0.1}
    for t in range(2):
        grad = random_grad((40, 300), torch.float32, generator(t))
        check_step([got], [expected], [grad], f"step {t}", **options)


@pytest.mark.parametrize("seed_step", [2**31 - 2, 2**32 + 5])
def test_late_steps(seed_step: int) -> None:
    """The step is part of the random numbers' counter, and of the bias corrections."""
    expected = make_problem((40, 256), dtype=torch.bfloat16, generator=generator())
    expected.state["step"] += seed_step
    got = to_gpu(expected)
    grad = random_grad((40, 256), torch.bfloat16, generator(1))
    check_step([got], [expected], [grad], "late", bias_correction=True)


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_skipped_parameters_do_not_move(bad: float, path: str) -> None:
    """Decided on the device; the others of the call go on."""
    kinds = {True: [(40, 300), (40, 256), (64, 512)], False: [(300,), (4096,), (5000,)]}
    for factored, shapes in kinds.items():
        bits = 8 if factored else 32
        expected = [
            make_problem(s, factored=factored, bits=bits, index=i, generator=generator(i))
            for i, s in enumerate(shapes)
        ]
        got = [to_gpu(problem) for problem in expected]
        for t in range(3):
            grads = [random_grad(s, torch.float32, generator(10 * t + i))
                     for i, s in enumerate(shapes)]  # fmt: skip
            if t == 1:
                grads[0].view(-1)[7] = bad
                grads[2].view(-1)[-1] = bad
            check_step(got, expected, grads, f"{path}, step {t}")
        assert [int(p.state["skipped"]) for p in got] == [1, 0, 1]
        assert [int(p.state["step"]) for p in got] == [2, 3, 2]


@pytest.mark.parametrize("shape", [(40, 300), (40, 256), (2, 40, 300), (300,)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_propagated_values(shape: tuple[int, ...], bad: float, path: str) -> None:
    factored = len(shape) > 1
    for dtype in DTYPES:
        expected = make_problem(
            shape, factored=factored, dtype=dtype, batched=len(shape) == 3, generator=generator()
        )
        got = to_gpu(expected)
        for t in range(3):
            grad = random_grad(shape, dtype, generator(t))
            if t == 1:
                grad.view(-1)[[0, 255]] = bad
            check_step([got], [expected], [grad], f"{dtype} step {t}", propagate=True)
        assert got.param.isnan().any()


# --- codec, arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e30])
@pytest.mark.parametrize("shape", [(5,), (3, 300), (2, 256), (7, 1000), (1000, 3), (0, 4)], ids=str)
def test_codec(shape: tuple[int, ...], scale: float) -> None:
    x = torch.randn(shape, generator=generator(1)) * scale
    for i, value in enumerate((math.nan, math.inf, -math.inf, 0.0, 3e38, 1e-40)):
        if x.numel() > 1000:
            x.view(-1)[(i * 97 + 5) % x.numel()] = value
    check_codec(x)


def test_codec_at_the_edges_between_levels() -> None:
    """A GPU's rough root decides next to them, and is not asked at them."""
    check_codec(near_code_edges())


def check_codec(x: torch.Tensor) -> None:
    codes, absmax = quant.quantize_blockwise(x)
    with gpu_operators():
        got_codes, got_absmax = schema.quantize_blockwise(on_gpu(x))
        got = schema.dequantize_blockwise(on_gpu(codes), on_gpu(absmax))
    assert_same_bits(
        {"codes": got_codes.cpu(), "absmax": got_absmax.cpu(), "values": got.cpu()},
        {"codes": codes, "absmax": absmax, "values": quant.dequantize_blockwise(codes, absmax)},
        f"codec {tuple(x.shape)}",
    )


@pytest.mark.parametrize("name", ["exp_avg", "absmax", "exp_avg_sq_row", "step", "skipped"])
def test_wrong_state_changes_nothing(name: str) -> None:
    problems = [to_gpu(make_problem((40, 256), index=i, generator=generator(i))) for i in range(2)]
    before = [problem.copy() for problem in problems]
    state = problems[1].state
    kept, state[name] = state[name], state[name].new_zeros(state[name].numel() + 1)
    with pytest.raises(RuntimeError, match=f"{name} 1: expected"):
        step(problems, [torch.ones(40, 256)] * 2)
    state[name] = kept
    for mine, other in zip(problems, before, strict=True):
        assert_same_bits(mine.tensors(), other.tensors(), "after a refused call")


def test_empty_lists_and_parameters() -> None:
    for shape in [(0, 5), (5, 0)]:
        problem = to_gpu(make_problem(shape, generator=generator()))
        step([problem], [torch.empty(shape)])
        assert int(problem.state["skipped"]) == 0
    assert torch.device(DEVICE).type == problem.param.device.type
