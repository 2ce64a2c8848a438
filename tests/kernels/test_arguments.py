"""The CPU kernels check what they are given before the first byte changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import HYPER, OPTIONS, assert_same_bits, make_problem
from strategies import laid_out
from torch import Tensor

from came8bit.ops import schema

pytestmark = pytest.mark.kernels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Arguments = dict[str, object]


def arguments(factored: bool) -> Arguments:
    """Arguments of a step of two parameters, by name."""
    problems = [make_problem((6, 512), factored=factored, generator=generator(i)) for i in (0, 1)]
    named: Arguments = {
        "params": [p.param for p in problems],
        "grads": [torch.ones(6, 512), torch.ones(6, 512)],
        **{name: [p.state[name] for p in problems] for name in problems[0].state},
        "views": [1, 6, 512, 0, 0] * 2,
        "lr_tensor": None,
        "hyper": [float(x) for x in HYPER.values()],
        "options": [int(x) for x in OPTIONS.values()],
    }
    return named


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
FACTORED = ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "rms_ratio"]
WRONG: list[tuple[str, bool, Callable[[Arguments], None], str]] = [
    *((f"{n} short", True, shorter(n), f"{n}: got 1 tensors, expected 2")
      for n in ["grads", *EVERY, *FACTORED]),
    *((f"{n} short", False, shorter(n), f"{n}: got 1 tensors, expected 2")
      for n in ["grads", *EVERY, "exp_avg_sq"]),
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
    ("views short", True, replaced("views", [1, 6, 512, 0, 0]), "views: got 5 integers, expected"),
    ("view size", True, replaced("views", [1, 6, 512, 0, 0, 1, 6, 511, 0, 0]), "parameter 1: got"),
    ("view sign", True, replaced("views", [1, 6, 512, 0, 0, -1, 6, -512, 0, 0]),
     "1: expected"),
    ("hyper short", True, replaced("hyper", [0.9] * 7), "hyper: got 7 values, expected 8"),
    ("options long", True, replaced("options", [0] * 7), "options: got 7 values, expected 6"),
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
        operator(*named.values())
    assert_same_bits(tensors, before, "after a refused call")


def test_empty_lists_and_parameters() -> None:
    """Nothing to do is no error."""
    names = list(arguments(True))
    empty = {name: [] for name in names} | {k: arguments(True)[k] for k in ("hyper", "options")}
    schema.factored_step_(*{**empty, "lr_tensor": None}.values())
    for shape in [(0, 5), (5, 0)]:
        problem = make_problem(shape, generator=generator())
        problem.run_op(torch.empty(shape))
        assert int(problem.state["skipped"]) == 0
