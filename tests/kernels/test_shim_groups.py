"""Lists of parameters on the shim: how launchers cut them, and how many launches they take."""

from __future__ import annotations

import sys

import pytest
import torch
from problems import Problem, arguments_of, assert_same_bits, generator, make_problem, random_grad
from shim.cases import GROUP, SMALL, run_shim_reference, step
from shim.control import Control
from shim.library import kernels
from strategies import DTYPES

from came8bit.ops import schema

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")


def many(count: int, **changes: object) -> tuple[list[Problem], list[torch.Tensor]]:
    shapes = [(9, 264), (40, 33), (3, 8), (70, 256), (1, 5)]
    problems = [
        make_problem(shapes[i % 5], dtype=DTYPES[i // 5 % 3], index=i, generator=generator(i),
                     **changes)
        for i in range(count)
    ]  # fmt: skip
    grads = [
        random_grad(p.param.shape, p.param.dtype, generator(99 + i)) for i, p in enumerate(problems)
    ]
    return problems, grads


@pytest.mark.parametrize("factored", [True, False])
def test_results_do_not_depend_on_how_the_work_is_cut(
    shim: Control, monkeypatch: pytest.MonkeyPatch, factored: bool
) -> None:
    """Groups, one block or many for a parameter, its place in the list, the order of threads."""
    expected, grads = many(30, factored=factored)
    start = [problem.copy() for problem in expected]
    for problem, grad in zip(expected, grads, strict=True):
        run_shim_reference(problem, grad)
    counts = set()
    for small, group, order, workers in [
        (0, 1, "forward", 1),
        (0, 20_000, "backward", 2),
        (0, 2**40, "random", 4),
        (2_000, 20_000, "forward", 3),
        (2**40, 1, "random", 2),
    ]:
        monkeypatch.setenv(SMALL, str(small))
        monkeypatch.setenv(GROUP, str(group))
        shim.configure(order=order, workers=workers)
        for direction in (1, -1):
            got = [problem.copy() for problem in start]
            shim.launches()
            step(got[::direction], grads[::direction])
            counts.add(len(shim.launches()))
            for i, (mine, other) in enumerate(zip(got, expected, strict=True)):
                assert_same_bits(mine.tensors(), other.tensors(), f"{small} {group} parameter {i}")
    assert len(counts) >= 3, "the cuts were all alike"


def test_the_cache_decides_how_large_groups_are(
    shim: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SMALL, "0")
    monkeypatch.delenv(GROUP, raising=False)
    counts = []
    for l2_bytes in (2**30, 400_000, 1):
        shim.configure(l2_bytes=l2_bytes)
        problems = [make_problem((64, 256), generator=generator(i)) for i in range(8)]
        shim.launches()
        step(problems, [random_grad((64, 256), torch.float32, generator()) for _ in problems])
        counts.append(len(shim.launches()))
    per_group = (counts[2] - counts[0]) // 7
    # 64 * 256 * 5 bytes each: half of the cache takes two of them.
    assert counts[1] - counts[0] == 3 * per_group > 0


def test_many_small_parameters_take_few_launches(shim: Control) -> None:
    """200 parameters of one kind: one launch, and what it takes to describe them."""
    for factored in (True, False):
        problems = [
            make_problem(
                (3, 40),
                factored=factored,
                bits=8 if factored else 32,
                index=i,
                generator=generator(i),
            )
            for i in range(200)
        ]
        expected = [problem.copy() for problem in problems]
        grads = [random_grad((3, 40), torch.float32, generator(i)) for i in range(200)]
        step(problems, grads)
        launches = shim.launches()
        assert [launch for launch in launches if launch.blocks > 1] == [launches[-1]]
        assert launches[-1].blocks == 200
        for mine, other, grad in list(zip(problems, expected, grads, strict=True))[::37]:
            run_shim_reference(other, grad)
            assert_same_bits(mine.tensors(), other.tensors(), "one of many")


def test_empty_lists_and_parameters(shim: Control) -> None:
    with kernels():
        named = arguments_of([make_problem((1, 8), generator=generator())], [])
        empty = {name: [] for name, value in named.items() if isinstance(value, list)}
        # The dispatcher has to see a tensor.
        schema.factored_step_(**{**named, **empty, "lr_tensor": torch.tensor(0.0)})
    empty = make_problem((0, 8), generator=generator())
    step([empty], [torch.zeros(0, 8)])
    assert shim.launches() == []
