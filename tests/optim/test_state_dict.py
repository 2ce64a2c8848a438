"""Saving, loading, copying: nothing is lost, nothing is shared, nothing foreign gets in."""

import copy
import io
import pickle

import pytest
import torch
from came_pytorch import CAME as OfficialCAME
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_training import fresh, make, train
from training import assert_same, same_bits, snapshot, start

from came8bit import CAME, CAME8bit, CAME32bit
from came8bit.validation import FORMAT_VERSION

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 96), (7,), (), (4096, 1), (16, 8, 3, 3), (4, 32, 40), (5, 6)]


def trained(dtype=torch.float32, steps=3, cls=CAME8bit, shapes=SHAPES, **options):
    return train(make(cls, dtype, shapes, **options), steps)


def through_file(state_dict, weights_only=True):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


WAYS = {
    "state_dict": lambda o: o.state_dict(),
    "deepcopy of it": lambda o: copy.deepcopy(o.state_dict()),
    "torch.save": lambda o: through_file(o.state_dict()),
    "pickle of it": lambda o: pickle.loads(pickle.dumps(o.state_dict())),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [CAME8bit, CAME32bit])
def test_resuming_is_bit_exact(cls, dtype, way):
    """Stochastic rounding included: the bits come from position, step and element."""
    unbroken = trained(dtype, steps=3, cls=cls)
    resumed = fresh(unbroken)
    resumed.load_state_dict(WAYS[way](unbroken))
    assert_same(snapshot(unbroken), snapshot(resumed))
    train(unbroken, 3, first=3)
    train(resumed, 3, first=3)
    assert_same(snapshot(unbroken), snapshot(resumed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_are_complete(how, dtype):
    """In other optimizers attributes were lost, or the copy went on with other options."""
    optimizer = trained(dtype, cautious=True, seed=5)
    other = how(optimizer)
    assert type(other) is type(optimizer)
    assert_same(snapshot(optimizer), snapshot(other))
    train(optimizer, 2, first=3)
    train(other, 2, first=3)
    assert_same(snapshot(optimizer), snapshot(other))
    other.add_param_group({"params": [start((3,))]})
    assert other.param_groups[1].keys() == other.param_groups[0].keys()


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=4).map(tuple), min_size=1, max_size=4),
    bits=st.sampled_from([32, 8, 4, 2, 0]),
    view=st.sampled_from(["smallest", "last_two"]),
    dtype=st.sampled_from(DTYPES),
    steps=st.integers(0, 2),
)
def test_round_trip_is_a_law(shapes, bits, view, dtype, steps):
    options = {"optim_bits": bits, "factored_view": view, "min_8bit_size": 0}
    optimizer = trained(dtype, steps, cls=CAME, shapes=shapes, **options)
    other = fresh(optimizer, optim_bits=bits)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(snapshot(optimizer), snapshot(other))


def test_state_moves_to_parameters_of_another_dtype():
    """Trained in fp32, continued in bf16: statistics and codes are as they were."""
    optimizer = trained()
    params = [p.detach().bfloat16().requires_grad_() for p in optimizer.param_groups[0]["params"]]
    other = CAME8bit(params)
    other.load_state_dict(optimizer.state_dict())
    before, after = snapshot(optimizer)[1], snapshot(other)[1]
    assert all(same_bits(before[key], after[key]) for key in before)
    train(other, 1)


def test_nothing_is_shared_with_the_given_dict():
    optimizer = trained(betas=[0.9, 0.999, 0.9999], lr=torch.tensor(1e-3))
    given_dict = optimizer.state_dict()
    other = fresh(optimizer)
    other.load_state_dict(given_dict)
    before = snapshot(optimizer)
    kept = copy.deepcopy(given_dict)
    train(other, 2, first=3)
    other.param_groups[0]["lr"].fill_(7.0)
    other.param_groups[0]["betas"][0] = 0.5
    assert_same(before, snapshot(optimizer))
    for index, saved in kept["state"].items():
        for name, value in saved.items():
            assert same_bits(value, given_dict["state"][index][name])
    assert given_dict["param_groups"] == kept["param_groups"]
    own = other.state_dict()
    other.load_state_dict(own)  # into itself
    for index, saved in own["state"].items():
        for name, value in saved.items():
            assert value.data_ptr() != other.state_dict()["state"][index][name].data_ptr()


def test_saved_tensors_need_not_be_contiguous():
    optimizer = trained(shapes=[(64, 96)])
    state_dict = copy.deepcopy(optimizer.state_dict())
    codes = state_dict["state"][0]["exp_avg"]
    state_dict["state"][0]["exp_avg"] = codes.t().contiguous().t()
    other = fresh(optimizer)
    other.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), snapshot(other))
    assert other.state[other.param_groups[0]["params"][0]]["exp_avg"].is_contiguous()


def test_empty_state_loads():
    """accelerate does this in prepare()."""
    optimizer = trained(steps=0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    train(optimizer, 1)
    bare = {"state": {}, "param_groups": [{"params": list(range(len(SHAPES))), "lr": 0.5}]}
    optimizer.load_state_dict(bare)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_options_come_from_the_state_and_missing_ones_stay():
    optimizer = trained(lr=0.5, weight_decay=0.25, cautious=True)
    optimizer.param_groups[0]["initial_lr"] = 0.75  # what a scheduler writes
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["cautious"], state_dict["param_groups"][0]["seed"]
    other = fresh(optimizer, lr=1e-3, seed=11)
    other.param_groups[0]["note"] = "kept"
    other.load_state_dict(state_dict)
    group = other.param_groups[0]
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.25
    assert group["initial_lr"] == 0.75
    assert group["note"] == "kept"
    assert group["cautious"] is False
    assert group["seed"] == 11
    assert group["format_version"] == FORMAT_VERSION


def test_keys_need_not_be_integers():
    """Tools key the state by parameter name."""
    optimizer = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"] = {f"layer.{k}": v for k, v in state_dict["state"].items()}
    group = state_dict["param_groups"][0]
    group["params"] = [f"layer.{k}" for k in group["params"]]
    other = fresh(optimizer)
    other.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), snapshot(other))


def test_hooks_see_a_shallow_copy():
    optimizer = trained()
    state_dict = optimizer.state_dict()

    def broken(_optimizer, given_dict):
        given_dict["param_groups"] = []

    optimizer.register_load_state_dict_pre_hook(broken)
    with pytest.raises(ValueError, match="got groups of"):
        optimizer.load_state_dict(state_dict)
    assert state_dict["param_groups"]


# --- refusals -------------------------------------------------------------------------------------


def change(path, value):
    def edit(state_dict):
        *parents, last = path
        for key in parents:
            state_dict = state_dict[key]
        state_dict[last] = value(state_dict[last]) if callable(value) else value

    return edit


def remove(*path):
    def edit(state_dict):
        *parents, last = path
        for key in parents:
            state_dict = state_dict[key]
        del state_dict[last]

    return edit


P0 = ("state", 0)
REFUSED = {
    "no state": (remove("state"), r"got a dict without \['state'\]"),
    "newer": (
        change(("param_groups", 0, "format_version"), FORMAT_VERSION + 1),
        rf"format_version {FORMAT_VERSION + 1}, this came8bit reads 1 to {FORMAT_VERSION}; upgrade",
    ),
    "no version": (remove("param_groups", 0, "format_version"), "came8bit did not write"),
    "fewer parameters": (
        change(("param_groups", 0, "params"), lambda p: p[:-1]),
        r"got groups of \[6\] parameters, expected groups of \[7\]",
    ),
    "more groups": (
        change(("param_groups",), lambda g: g + g),
        r"got groups of \[7, 7\] parameters, expected groups of \[7\]",
    ),
    "bad betas": (change(("param_groups", 0, "betas"), (0.9, 0.999)), "group 0: got betas"),
    "nan lr": (change(("param_groups", 0, "lr"), float("nan")), "group 0: got lr nan"),
    "stranger": (change(("state",), lambda s: {**s, 99: s[0]}), "got state for parameters 99"),
    "other shape": (
        change((*P0, "exp_avg"), lambda t: t[:-1]),
        r"parameter 0 \(shape \(64, 96\)\) does not fit: got exp_avg of torch.int8 and shape "
        r"\(63, 96\), expected torch.int8 and shape \(64, 96\)",
    ),
    "swapped": (
        change(("state",), lambda s: {**s, 0: s[5], 5: s[0]}),
        r"parameter 0 \(shape \(64, 96\)\) does not fit",
    ),
    "cast statistics": (
        change((*P0, "exp_avg_sq_row"), lambda t: t.bfloat16()),
        "got exp_avg_sq_row of torch.bfloat16 and shape",
    ),
    "cast codes": (change((*P0, "exp_avg"), lambda t: t.float()), "got exp_avg of torch.float32"),
    "missing buffer": (remove(*P0, "absmax"), "got buffers .* expected .*absmax"),
    "extra buffer": (change(P0, lambda s: {**s, "RMS": 0}), "got buffers .*RMS.* expected"),
    "a string": (change((*P0, "absmax"), "lost"), "absmax is a str, expected a tensor"),
    "a generator": (change((*P0, "absmax"), iter([1])), "absmax is a list_iterator"),
    "not a dict": (change(P0, 3), "got the state of a parameter as int, expected a dict"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_states_change_nothing(case, dtype):
    edit, message = REFUSED[case]
    state_dict = copy.deepcopy(trained(dtype, steps=2).state_dict())
    edit(state_dict)
    optimizer = trained(dtype, steps=1, lr=0.01)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^load_state_dict: .*{message}.*; nothing has been ch"):
        optimizer.load_state_dict(state_dict)
    assert_same(before, snapshot(optimizer))
    train(optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [OfficialCAME, torch.optim.AdamW, torch.optim.SGD])
def test_states_of_other_optimizers_are_refused(cls, dtype):
    params = [start(shape, dtype) for shape in SHAPES if shape]
    other = cls(params, lr=1e-3)
    train(other, 2)
    optimizer = CAME8bit([start(shape, dtype) for shape in SHAPES if shape])
    train(optimizer, 1)
    before = snapshot(optimizer)
    state_dict = other.state_dict()
    if cls is torch.optim.SGD:  # no momentum, no state: nothing to mistake
        optimizer.load_state_dict(state_dict)
        assert not optimizer.state
        return
    with pytest.raises(ValueError, match="came8bit did not write this state"):
        optimizer.load_state_dict(state_dict)
    assert_same(before, snapshot(optimizer))
    # A tool that adds our version does not make it ours.
    for group in state_dict["param_groups"]:
        group["format_version"] = 1
    with pytest.raises(ValueError, match=r"load_state_dict: .*(does not fit|got betas)"):
        optimizer.load_state_dict(state_dict)
    assert_same(before, snapshot(optimizer))
