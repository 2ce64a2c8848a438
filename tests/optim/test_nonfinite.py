"""Gradients that are not finite."""

import math
import warnings

import pytest
import torch
from training import assert_same, parameter, snapshot, start, with_gradient

from came8bit import CAME, CAME8bit, PagedCAME8bit
from came8bit.state.layout import _LARGEST

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


def test_raise_when_the_preconditioned_gradient_overflows():
    """It can only where the state is broken already: u = g / sqrt(v) is of order one."""
    param = with_gradient(64)
    optimizer = CAME8bit([param], nonfinite="raise")
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(math.nan)
    before = param.detach().clone()
    wanted = "parameter 0 is not finite although its gradient is: exp_avg_sq has NaN. Load a check"
    with pytest.raises(FloatingPointError, match=wanted):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("stateless", [False, True])
def test_raise_names_what_made_the_gradients_bad(stateless):
    """NaN in one parameter makes every gradient NaN; the gradients are not to blame."""
    params = {"healthy": with_gradient(64, 64), "broken": with_gradient(64, 64)}
    optimizer = CAME8bit(params.items(), nonfinite="raise")
    said = "its own values are not finite"
    if stateless:
        params["broken"].data[0, 0] = math.nan
    else:
        optimizer.step()
        optimizer.state[params["broken"]]["exp_avg"].fill_(-128)
        said = "exp_avg has codes of NaN"
    for param in params.values():
        param.grad.fill_(math.nan)
    wanted = rf"0 .*, 1 .* not finite, probably because of parameter 1 \(broken\): {said}. Load a"
    with pytest.raises(FloatingPointError, match=wanted):
        optimizer.step()


# What one bad value in the state does in the next step, as docs/internals/algorithm.md says it:
# elements of the parameter that are NaN or infinite then, or that the parameter is skipped.
MATRIX, VECTOR = (64, 64), (300,)
BAD_STEPS = [
    (MATRIX, 32, "exp_avg", math.nan, 64 * 64),
    (MATRIX, 32, "exp_avg", 3e38, 64 * 64),
    (MATRIX, 8, "exp_avg", -128, 64 * 64),
    (MATRIX, 8, "absmax", math.inf, 64 * 64),
    (MATRIX, 4, "scales", math.nan, 64 * 64),
    (MATRIX, 32, "exp_avg_sq_row", math.nan, "skipped"),
    (MATRIX, 32, "exp_avg_sq_row", math.inf, "skipped"),
    (MATRIX, 32, "exp_avg_sq_row", -1.0, "skipped"),
    (MATRIX, 32, "exp_avg_sq_col", math.nan, "skipped"),
    (MATRIX, 32, "exp_avg_sq_col", math.inf, 0),
    (MATRIX, 32, "exp_avg_res_row", math.nan, 64 * 64),
    (MATRIX, 32, "exp_avg_res_col", math.nan, 64),
    (MATRIX, 32, "rms_ratio", math.nan, 0),
    (VECTOR, 32, "exp_avg", math.nan, 1),
    (VECTOR, 32, "exp_avg_sq", math.nan, "skipped"),
    (VECTOR, 32, "exp_avg_sq", math.inf, 0),
]


@pytest.mark.parametrize(("shape", "bits", "name", "value", "then"), BAD_STEPS)
def test_a_step_on_bad_state(shape, bits, name, value, then):
    param = with_gradient(*shape)
    optimizer = CAME([param], optim_bits=bits)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param][name].view(-1)[0] = value
    optimizer.step()
    if then == "skipped":
        assert int(optimizer.state[param]["skipped"]) == 1
        assert torch.equal(param, before)
    else:
        assert int(optimizer.state[param]["skipped"]) == 0
        assert int((~param.isfinite()).sum()) == then


@pytest.mark.parametrize("shape", [MATRIX, VECTOR])
@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_the_largest_values_that_may_be_loaded_do_not_overflow(shape, bits):
    param = with_gradient(*shape)
    optimizer = CAME([param], optim_bits=bits, min_8bit_size=0, quantize_vectors=bits < 32)
    optimizer.step()
    state = optimizer.state[param]
    for name in state.keys() & _LARGEST.keys():
        if state[name].is_floating_point():
            state[name].fill_(_LARGEST[name])
    other = CAME([param], optim_bits=bits, min_8bit_size=0, quantize_vectors=bits < 32)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        other.step()
    assert other.skipped_steps() == 0
    assert param.isfinite().all()
    assert all(value.isfinite().all() for value in other.state[param].values())


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


# Of state that is not finite, what the warning says of it.
BAD_STATE = [
    ("exp_avg_sq_row", math.nan, "exp_avg_sq_row has NaN"),
    ("exp_avg_sq_row", math.inf, "exp_avg_sq_row has infinite values"),
    ("exp_avg_sq_col", -1.0, "exp_avg_sq_col has negative values"),
    ("exp_avg_res_row", math.nan, "exp_avg_res_row has NaN"),
    ("exp_avg_res_col", math.inf, "exp_avg_res_col has infinite values"),
    ("exp_avg", -128, "exp_avg has codes of NaN"),
    ("absmax", math.inf, "absmax has infinite values"),
    ("rms_ratio", math.nan, "rms_ratio has NaN"),
    ("param", math.nan, "its own values are not finite"),
]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("name", "value", "said"), BAD_STATE)
def test_bad_state_is_told_from_a_bad_gradient(name, value, said, paged):
    """The gradient is what NaN looks like from there, but it is not where it comes from."""
    healthy, param = start((64, 64)), start((64, 64))
    named = [("healthy", healthy), ("broken", param)]
    optimizer = (PagedCAME8bit if paged else CAME8bit)(named)
    healthy.grad, param.grad = torch.ones(64, 64), torch.ones(64, 64)
    optimizer.step()
    state = {key: tensor.clone() for key, tensor in optimizer._store.read(param).items()}
    {**state, "param": param.detach()}[name].view(-1)[0] = value
    optimizer._store.write(param, state)
    for _ in range(2):
        healthy.grad[0, 0] = param.grad[0, 0] = math.nan
        optimizer.step()
    with pytest.warns(RuntimeWarning) as caught:
        assert optimizer.skipped_steps() == 4
    assert optimizer.skipped_steps() == 4  # told once
    (warning,) = caught
    assert f"not for their gradients: parameter 1 (broken): {said}. Load" in str(warning.message)
    assert warning.filename == __file__


def test_skipped_steps_before_the_first_step():
    assert CAME8bit([parameter(2)]).skipped_steps() == 0


@pytest.mark.parametrize("asked", ["step", "state_dict"])
def test_numbers_that_a_cuda_graph_has_frozen(monkeypatch, asked):
    """Every later call that can notice a change says so, once; a tensor is not frozen."""
    rate = torch.tensor(1e-3)
    params = [with_gradient(8, 8), with_gradient(8)]
    optimizer = CAME8bit([{"params": params[:1], "lr": rate}, {"params": params[1:]}], lr=1e-3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rate.fill_(1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-5)
        optimizer.param_groups[1]["lr"] = 5e-4
    with pytest.warns(
        RuntimeWarning, match=r"group 1: lr is 0\.0005, but was 0\.001 when"
    ) as caught:
        getattr(optimizer, asked)()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(optimizer, asked)()
