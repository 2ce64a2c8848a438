"""Gradients that are not finite."""

import math
import warnings

import pytest
import torch
from training import assert_same, parameter, snapshot, start, with_gradient

from came8bit import CAME8bit
from came8bit.validation import check_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_raise_leaves_everything_as_it_was():
    params = [with_gradient(64, 64), with_gradient(7), with_gradient(8, 8)]
    optimizer = CAME8bit(params, nonfinite="raise")
    params[1].grad[2] = math.nan
    params[2].grad[0, 0] = -math.inf
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match=r"parameter 1 \(shape \(7,\)\), 2 \(shape \(8, 8"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    assert not optimizer.state
    for param in params:
        param.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_raise_looks_in_fp32(dtype):
    """A norm that overflows fp16 is no reason to raise."""
    param = start((64, 64), dtype)
    param.grad = torch.full((64, 64), 6e4).to(dtype)
    CAME8bit([param], nonfinite="raise").step()
    check_finite([])


def test_raise_when_the_preconditioned_gradient_overflows():
    """It can only where the state is broken already: u = g / sqrt(v) is of order one."""
    param = with_gradient(64)
    optimizer = CAME8bit([param], nonfinite="raise")
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(math.nan)
    before = param.detach().clone()
    with pytest.raises(FloatingPointError, match="preconditioned gradient of a parameter"):
        optimizer.step()
    assert torch.equal(param, before)


def test_propagate_computes_with_what_is_there():
    param = with_gradient(64, 64)
    param.grad[0, 0] = math.nan
    optimizer = CAME8bit([param], nonfinite="propagate")
    optimizer.step()
    assert param.isnan().any()
    assert optimizer.skipped_steps() == 0


def test_skips_are_counted_and_warned_about_late_and_rarely():
    param, healthy = start((64, 64)), start((8,))
    optimizer = CAME8bit([param, healthy])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(128):
            param.grad = torch.full((64, 64), math.nan)
            healthy.grad = torch.ones(8)
            optimizer.step()
    assert optimizer.skipped_steps() == 128
    assert [str(w.message).split()[1] for w in caught] == ["16", "112"]
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught)
    assert int(optimizer.state[param]["step"]) == 0
    assert int(optimizer.state[healthy]["step"]) == 128


def test_skipped_steps_before_the_first_step():
    assert CAME8bit([parameter(2)]).skipped_steps() == 0
