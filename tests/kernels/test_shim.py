"""The CUDA kernels and their launchers, run on the CPU by the shim (``tests/shim``), have the bits
of ``reference.py`` with the sums of its ``SHIM_TREE``.

Every comparison is of whole steps: parameter and all state, to the last bit. The device that the
launchers believe in is small, so that few elements make several groups and many blocks.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DENSE, case_of
from problems import assert_same_bits, generator, make_problem, near_code_edges, random_grad
from shim import large
from shim.build import ADDRESS, HERE, PLAIN, REPOSITORY, THREAD, Build, run_python
from shim.cases import (
    CASES,
    GROUP,
    OF_PASSES,
    SMALL,
    ListCase,
    check_codec,
    check_codec_of,
    run_shim_reference,
    step,
)
from shim.control import ORDERS, Control
from shim.library import kernels
from strategies import DTYPES, LAYOUTS, Case, cases, laid_out

from came8bit.ops import schema

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")

PATHS = ["sweeps", "small"]
"""Three sweeps for every parameter, or one block for each."""


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path through the launchers in turn."""
    use_path(monkeypatch, request.param)
    name: str = request.param
    return name


def use_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv(SMALL, "0" if path == "sweeps" else str(2**40))


def check(case: Case, steps: int) -> None:
    got = case.problem()
    expected = got.copy()
    for t, grad in enumerate(case.grads(steps), 1):
        step([got], [grad], **case.options)
        run_shim_reference(expected, grad, **case.options)
        assert_same_bits(got.outcome(), expected.outcome(), f"step {t}, {case}")


# --- against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(shim: Control, path: str, case: ListCase, order: str) -> None:
    shim.configure(order=order, l2_bytes=40_000, workers=3)
    case.check()
    most = max(launch.at_once for launch in shim.launches())
    assert most > 1 or path == "small"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_passes_of_the_table(shim: Control, case: ListCase) -> None:
    """On three ranks, of which the last has no rows."""
    shim.configure(order="random", workers=3)
    case.check_passes(steps=2)


def kernels_of(library: Path) -> dict[int, str]:
    """Every kernel in a build of the shim, by its offset."""
    declared = re.compile(r"__global__[^;{]*?(\w+)\((?!kThreads)")
    texts = [path.read_text() for path in (REPOSITORY / "csrc" / "cuda").iterdir()]
    names = "|".join({name for text in texts for name in declared.findall(text)})
    done = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True)
    symbol = rf"(\w+) . .*came8bit::(?:\(anonymous namespace\)::)?((?:{names})(?:<.*>)?)\(.*\)$"
    found = re.findall(symbol, done.stdout, re.MULTILINE)
    return {int(offset, 16): name for offset, name in found}


def test_the_table_reaches_every_kernel(shim: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no case launches is not tested, or is compiled for nothing."""
    compiled = kernels_of(PLAIN.library("_C_shim"))
    assert len(compiled) > 40
    reached = set()
    for path in PATHS:
        use_path(monkeypatch, path)
        for case in CASES:
            shim.launches()
            case.check(steps=1)
            reached |= {launch.kernel for launch in shim.launches()}
    for case in CASES:
        if case.name in OF_PASSES:
            case.check_passes(steps=1)
            reached |= {launch.kernel for launch in shim.launches()}
    assert {case.name for case in CASES} >= set(OF_PASSES)
    check_codec((3, 8))
    reached |= {launch.kernel for launch in shim.launches()}
    assert {name for offset, name in compiled.items() if offset not in reached} == set()
    assert reached <= set(compiled)


@pytest.mark.parametrize(("large", "more"), [(1, 0), (0, 6 + 1)])
def test_arguments_of_kernels_are_as_large_as_the_driver_allows(
    shim: Control, large: int, more: int
) -> None:
    """50 parameters and strides are described by one launch each, or by 7 and 2 smaller ones."""
    shim.configure(large_arguments=large)
    problems = [make_problem((3, 40), index=i, generator=generator(i)) for i in range(50)]
    expected = [problem.copy() for problem in problems]
    grads = [random_grad((3, 40), torch.float32, generator(i)) for i in range(50)]
    grads = [laid_out(grad, "sliced") for grad in grads]
    step(problems[:4], grads[:4])
    few = len(shim.launches())
    step(problems[4:] + problems[:4], grads[4:] + grads[:4])
    assert len(shim.launches()) - few == more
    for i, (mine, other) in enumerate(zip(problems, expected, strict=True)):
        for _ in range(2 if i < 4 else 1):
            run_shim_reference(other, grads[i])
        assert_same_bits(mine.tensors(), other.tensors(), f"parameter {i}")


@settings(max_examples=80)
@given(
    cases(elements=3_000),
    st.integers(1, 3),
    st.sampled_from(PATHS),
    st.sampled_from(ORDERS),
    st.sampled_from([0xFF, 0x7F]),
)
def test_bits_of_the_reference(
    library: Control, case: Case, steps: int, path: str, order: str, garbage: int
) -> None:
    library.configure(order=order, seed=case.seed % 1000, garbage=garbage)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_path(monkeypatch, path)
        check(case, steps)


# Where something else begins: lanes of a row, strips of 256 columns, slabs of 64 rows and more,
# chunks of 32, tiles of 16,384 elements, blocks that begin inside rows, offsets that share a word
# of random bits with the elements before.
EDGES: list[tuple[tuple[int, ...], dict[str, object]]] = [
    ((1, 1), {}),
    ((1025, 8), {}),
    ((257, 16), {"dtype": torch.bfloat16, "grad_dtype": torch.bfloat16}),
    ((1300, 3), {}),
    ((3, 2049), {}),
    ((2, 4096), {"dtype": torch.float16, "grad_dtype": torch.float16}),
    ((65, 256), {"grad_dtype": torch.bfloat16}),
    ((129, 520), {"bits": 32}),
    ((33, 257), {"dtype": torch.bfloat16}),
    ((17, 504), {"offset": 4}),
    ((17, 504), {"offset": 2**40 + 8, "dtype": torch.bfloat16}),
    ((3, 70, 256), {"batched": True}),
    ((3, 70, 24), {"batched": True}),
    ((40, 2, 3, 3), {"batched": True}),
    ((16, 16, 3, 3), {"layout": "channels_last", "grad_layout": "channels_last"}),
    ((), {"factored": False, "bits": 32}),
    ((16385,), {"factored": False, "bits": 32, "dtype": torch.bfloat16}),
    ((16385,), {"factored": False, "dtype": torch.bfloat16}),
    ((16384,), {"factored": False}),
    ((600, 1), {"factored": False}),
    ((33, 256), {"factored": False, "grad_layout": "reversed"}),
    ((7, 1000), {"factored": False, "dtype": torch.float16}),
]


@pytest.mark.parametrize(("shape", "changes"), EDGES, ids=str)
def test_edges(
    shim: Control, path: str, shape: tuple[int, ...], changes: dict[str, object]
) -> None:
    check(case_of(shape, **changes), 2)
    check(case_of(shape, **changes, options={"cautious": True, "bias_correction": True}), 2)
    check(case_of(shape, **changes, **DENSE), 2)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8, 4, 2, 0])
def test_every_pair_of_dtypes(
    shim: Control, path: str, bits: int, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    for shape in [(9, 264), (3, 300), (7, 31)]:
        for factored in (True, False):
            for changes in ({}, {"options": {"stochastic": False}}, DENSE):
                case = case_of(shape, factored=factored, bits=bits, **changes)
                check(replace(case, dtype=dtype, grad_dtype=grad_dtype), 1)


@pytest.mark.parametrize("shape", [(4, 256), (4, 300), (2, 4, 300), (300,)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(
    shim: Control, path: str, shape: tuple[int, ...], bad: float
) -> None:
    """Skipped or propagated as in the reference, and the neighbours in the list go on."""
    for propagate in (False, True):
        changes = {"factored": len(shape) > 1, "batched": len(shape) == 3}
        problems = [make_problem(shape, generator=generator(i), **changes) for i in range(3)]
        expected = [problem.copy() for problem in problems]
        for t in range(3):
            grads = [random_grad(shape, torch.float32, generator(9 * t + i)) for i in range(3)]
            if t == 1:
                grads[1].view(-1)[[0, 299]] = bad
            step(problems, grads, propagate=propagate)
            for mine, other, grad in zip(problems, expected, grads, strict=True):
                run_shim_reference(other, grad, propagate=propagate)
                assert_same_bits(mine.outcome(), other.outcome(), f"step {t}")
        assert [int(p.state["skipped"]) for p in problems] == [0, int(not propagate), 0]


def test_u_that_is_not_finite(shim: Control, path: str) -> None:
    """The gradient is finite, the preconditioned gradient is not: known after the second sweep."""
    for shape, factored in (((4, 256), True), ((256,), False)):
        got = make_problem(shape, factored=factored, generator=generator())
        expected = got.copy()
        options = {"beta2": 0.0, "eps1": 0.0}
        for t, grad in enumerate((torch.full(shape, 1e-30), torch.ones(shape))):
            step([got], [grad], **options)
            run_shim_reference(expected, grad, **options)
            assert_same_bits(got.tensors(), expected.tensors(), f"{shape} step {t}")
        assert (int(got.state["skipped"]), int(got.state["step"])) == (1, 1)


def test_gradient_of_one_value_everywhere(shim: Control, path: str) -> None:
    """Expanded gradients, as ``sum().backward()`` makes them, have strides of 0."""
    for shape in [(9, 256), (3, 5, 256), (70, 1)]:
        got = make_problem(shape, batched=len(shape) == 3, generator=generator())
        expected = got.copy()
        for grad in (torch.tensor(0.5), torch.randn(shape[-1], generator=generator(1))):
            step([got], [grad.expand(shape)])
            run_shim_reference(expected, grad.expand(shape))
        assert_same_bits(got.tensors(), expected.tensors(), f"{shape}")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_memory_between_the_elements_is_not_touched(shim: Control, path: str, layout: str) -> None:
    problem = make_problem((9, 7, 5, 3), dtype=torch.bfloat16, generator=generator())
    problem.param = laid_out(problem.param, layout)
    base = problem.param if problem.param._base is None else problem.param._base
    before = base.clone()
    step([problem], [random_grad((9, 7, 5, 3), torch.float32, generator(1), zeros=0.0)], lr=0.1)
    inside = torch.zeros_like(base, dtype=torch.bool)
    inside.as_strided(problem.param.shape, problem.param.stride(),
                      problem.param.storage_offset()).fill_(True)  # fmt: skip
    assert torch.equal(base[~inside].nan_to_num(), before[~inside].nan_to_num())
    assert int((base != before)[inside].sum()) > 0.9 * problem.param.numel()


# --- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-35, 1e-43, 1e38])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (256,), (257,), (3, 300), (2, 3, 256), (9, 1), (0,), (0, 7), (7, 0)],
    ids=str,
)
def test_codec(shim: Control, shape: tuple[int, ...], scale: float, special: bool) -> None:
    check_codec(shape, scale, special)


def test_codec_at_the_edges_between_levels(shim: Control) -> None:
    """There the root of the fast path is not good enough, and the other one has to take over."""
    check_codec_of(near_code_edges())


def test_codec_of_a_view(shim: Control) -> None:
    """Strides are the operator's business."""
    x = torch.randn(40, 30, generator=generator()).t()
    with kernels():
        codes, absmax = schema.quantize_blockwise(x)
        expected = schema.quantize_blockwise(x.contiguous())
        back = schema.dequantize_blockwise(codes, absmax)
        strided = schema.dequantize_blockwise(codes.t().contiguous().t(), absmax)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    assert torch.equal(back, strided)


# --- more than 2**32 elements ---------------------------------------------------------------------


@pytest.mark.parametrize("name", large.CHECKS)
def test_indices_have_64_bits(shim: Control, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(SMALL, raising=False)
    monkeypatch.delenv(GROUP, raising=False)
    large.CHECKS[name](shim)


# --- in a process of its own ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """The table of cases under each sanitizer, side by side."""

    def check(build: Build) -> subprocess.CompletedProcess[str]:
        library = build.make("_C_shim")
        return run_python(build, HERE / "check.py", library, "--steps", 2, "--workers", 3)

    with ThreadPoolExecutor() as pool:
        return {build.name: pool.submit(check, build) for build in (ADDRESS, THREAD)}


@pytest.mark.parametrize("build", [ADDRESS, THREAD], ids=lambda build: build.name)
def test_under_a_sanitizer(
    checked: dict[str, Future[subprocess.CompletedProcess[str]]], build: Build
) -> None:
    """No access beyond a tensor or the workspace, and no race between any two threads."""
    done = checked[build.name].result()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
