"""The CPU kernels check what they are given before the first byte changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import arguments_of, assert_same_bits, generator, make_problem
from strategies import laid_out
from torch import Tensor

from came8bit.ops import schema

pytestmark = pytest.mark.kernels


Arguments = dict[str, object]


def arguments(factored: bool) -> Arguments:
    """Arguments of a step of two parameters, by name."""
    problems = [make_problem((6, 512), factored=factored, generator=generator(i)) for i in (0, 1)]
    return arguments_of(problems, [torch.ones(6, 512), torch.ones(6, 512)])


def second(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    """Replace the tensor of the second parameter."""

    def apply(named: Arguments) -> None:
        tensors = named[name]
        assert isinstance(tensors, list)
        tensors[1] = change(tensors[1])

    return apply


def replaced(name: str, value: object) -> Callable[[Arguments], None]:
    return lambda named: named.update({name: value})


def shorter(name: str) -> Callable[[Arguments], None]:
    return lambda named: named.update({name: named[name][:-1]})  # type: ignore[index]


EVERY = ["exp_avg", "absmax", "step", "skipped"]
PLACES = ["param_index", "element_offset"]
FACTORED = ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "rms_ratio"]
WRONG: list[tuple[str, bool, Callable[[Arguments], None], str]] = [
    *((f"{n} short", True, shorter(n), f"{n}: got 1 values, expected 2")
      for n in ["grads", *EVERY, *FACTORED, *PLACES]),
    *((f"{n} short", False, shorter(n), f"{n}: got 1 values, expected 2")
      for n in ["grads", *EVERY, "exp_avg_sq", *PLACES]),
    *((f"{n} size", True, second(n, lambda t: t.new_zeros(t.numel() + 1)), f"{n} 1: expected")
      for n in [*EVERY, *FACTORED]),
    *((f"{n} dtype", True, second(n, lambda t: t.to(torch.float64)), f"{n} 1: expected")
      for n in [*EVERY, *FACTORED]),
    ("exp_avg_sq size", False, second("exp_avg_sq", lambda t: t[:-1]), "exp_avg_sq 1: expected"),
    ("exp_avg_sq dtype", False, second("exp_avg_sq", torch.Tensor.half), "exp_avg_sq 1: expected"),
    ("exp_avg strides", True, second("exp_avg", lambda t: laid_out(t, "reversed")),
     "exp_avg 1: expected a contiguous"),
    ("absmax strides", True, second("absmax", lambda t: laid_out(t, "reversed")),
     "absmax 1: expected a contiguous"),
    ("exp_avg codes without absmax", True, replaced("absmax", []), "exp_avg 0: expected"),
    ("param dtype", True, second("params", torch.Tensor.double), "parameter 1: expected float32"),
    ("grad dtype", True, second("grads", torch.Tensor.long), "gradient 1: expected float32"),
    ("grad size", True, second("grads", lambda t: t[:-1]), "gradient 1: expected the shape"),
    ("grad shape", True, second("grads", lambda t: t.view(512, 6)), "gradient 1: expected"),
    ("rows", True, second("exp_avg_sq_row", lambda t: t.new_zeros(1, 5)),
     "parameter 1: got 3072 elements and statistics of 2560"),
    ("columns", True, second("exp_avg_sq_col", lambda t: t.new_zeros(1, 511)),
     "parameter 1: got 3072 elements and statistics of 3066"),
    ("matrices", True, second("exp_avg_sq_col", lambda t: t.new_zeros(2, 256)),
     "exp_avg_sq_col 1: expected the same number of matrices"),
    ("lr size", True, replaced("lr_tensor", torch.ones(2)), "lr_tensor 0: expected"),
    ("lr dtype", True, replaced("lr_tensor", torch.ones((), dtype=torch.float64)),
     "lr_tensor 0: expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("factored", "change", "message"),
    [row[1:] for row in WRONG],
    ids=[f"{row[0]}-{'factored' if row[1] else 'unfactored'}" for row in WRONG],
)
def test_wrong_arguments_change_nothing(
    factored: bool, change: Callable[[Arguments], None], message: str
) -> None:
    """Everything is checked first: the first parameter, which is in order, does not move either."""
    named = arguments(factored)
    change(named)
    lists = {name: value for name, value in named.items() if isinstance(value, list)}
    tensors = {
        f"{name} {i}": t for name, ts in lists.items() for i, t in enumerate(ts)
        if isinstance(t, Tensor)
    }  # fmt: skip
    before = {name: t.clone() for name, t in tensors.items()}
    operator = schema.factored_step_ if factored else schema.unfactored_step_
    with pytest.raises(RuntimeError, match=message):
        operator(**named)
    assert_same_bits(tensors, before, "after a refused call")


def test_empty_lists_and_parameters() -> None:
    """Nothing to do is no error."""
    named = arguments(True)
    empty = {name: [] for name, value in named.items() if isinstance(value, list)}
    schema.factored_step_(**{**named, **empty})
    for shape in [(0, 5), (5, 0)]:
        problem = make_problem(shape, generator=generator())
        problem.run_op(torch.empty(shape))
        assert int(problem.state["skipped"]) == 0
