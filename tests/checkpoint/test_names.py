"""Names in checkpoints: what wrappers put into them, and what happens without them."""

import warnings

import pytest
import torch
from checkpoints import SHAPES, by_name, copies, parameters, train, trained
from training import same_bits

from came8bit import CAME8bit, load_checkpoint, save_checkpoint
from came8bit.state_dict.values import order_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.safetensors"


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 96))


def saved(model, path):
    """An optimizer over ``model`` after a step, saved."""
    optimizer = CAME8bit(model.named_parameters())
    model(torch.ones(2, 96)).square().mean().backward()
    optimizer.step()
    save_checkpoint(optimizer, path)
    return optimizer


def same(first, second):
    for one, other in zip(
        first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True
    ):
        a, b = first._store.read(one), second._store.read(other)
        assert a.keys() == b.keys()
        assert all(same_bits(a[key], b[key]) for key in a)


# --- wrappers -------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """What DistributedDataParallel and DataParallel do to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model[0] = compiled(model[0])
    return model


WRAPPED = {
    "module.": (Wrapper, ["module."]),
    "DataParallel": (torch.nn.DataParallel, ["module."]),
    "average": (torch.optim.swa_utils.AveragedModel, ["module."]),
    "compile": (compiled, ["_orig_mod."]),
    "compile inside": (compiled_inside, ["_orig_mod."]),
    "both": (lambda model: compiled(Wrapper(model)), ["_orig_mod.", "module."]),
    "both, the other way": (lambda model: Wrapper(compiled(model)), ["_orig_mod.", "module."]),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("direction", ["to wrapped", "from wrapped", "same"])
def test_wrappers_do_not_count(path, wrapper, direction):
    wrap, words = WRAPPED[wrapper]
    makers = [net, lambda: wrap(net())]
    if direction == "from wrapped":
        makers.reverse()
    elif direction == "same":
        makers[0], words = makers[1], []
    optimizer = saved(makers[0](), path)
    other = CAME8bit(makers[1]().named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is as it was: nothing to warn of
        report = load_checkpoint(other, path)
    same(optimizer, other)
    assert report.matched_by == "name"
    assert list(report.wrappers) == words
    without = f"by name without {' and '.join(words)}"
    assert without in str(report) if words else "without" not in str(report)
    assert other.param_groups[0]["param_names"] == [n for n, _ in makers[1]().named_parameters()]


ORDERS = [
    (["a", "b"], ["b", "a"], [1, 0], []),
    (["module.a", "module.b"], ["b", "a"], [1, 0], ["module."]),
    (["module.module.a"], ["module.a"], [0], ["module."]),
    (["_orig_mod.module.a"], ["module._orig_mod.a"], [0], ["_orig_mod.", "module."]),
    (["x._orig_mod.a"], ["_fsdp_wrapped_module.x.a"], [0], ["_fsdp_wrapped_module.", "_orig_mod."]),
    ([], [], [], []),
]


@pytest.mark.parametrize(("own", "names", "order", "wrappers"), ORDERS, ids=str)
def test_the_order_that_names_give(own, names, order, wrappers):
    assert order_of(own, names) == (order, wrappers)


DIFFERENT = [
    (["a"], ["b"]),
    (["module.a"], ["module.b"]),
    (["module.a", "b"], ["a", "b"]),  # a part that is called module
    (["x.module.a"], ["x.a"]),
    (["x._orig_mod.a", "x.a"], ["x.a", "x.b"]),
    (["_orig_mod.a", "a"], ["a"]),  # a part of its own that is compiled: two parameters
    (["module"], ["orig"]),
    (["a", "b"], ["a"]),
]


@pytest.mark.parametrize(("own", "names"), DIFFERENT, ids=str)
def test_other_names_are_refused_as_they_are(own, names):
    with pytest.raises(ValueError, match=r"for other parameters: not saved: "):
        order_of(own, names)


# --- without names --------------------------------------------------------------------------------

TWINS = {"a": (100, 100), "b": (100, 100), "c": (7,)}


def test_a_swap_that_nobody_can_see_is_warned_of(path):
    params, optimizer = trained(shapes=TWINS)
    save_checkpoint(optimizer, path)
    again = copies(params, ["b", "a", "c"])
    other = CAME8bit(again.values())
    cure = r"2 parameters have the shape of another one \(a, b\).*model\.named_parameters\(\)"
    with pytest.warns(UserWarning, match=cure):
        report = load_checkpoint(other, path)
    assert list(report.unsure) == ["a", "b"]
    assert report.matched_by == "position"
    # What it warns of has happened, and with names it does not.
    assert same_bits(
        by_name(again, other)["b", "exp_avg"], by_name(params, optimizer)["a", "exp_avg"]
    )
    named = CAME8bit(again.items())
    with pytest.warns(UserWarning, match="another position"):
        assert not load_checkpoint(named, path).unsure
    assert same_bits(
        by_name(again, named)["b", "exp_avg"], by_name(params, optimizer)["b", "exp_avg"]
    )


def quiet(optimizer, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_checkpoint(optimizer, path)


def test_shapes_that_differ_are_enough(path):
    params, optimizer = trained(shapes=SHAPES)
    save_checkpoint(optimizer, path)
    assert not quiet(CAME8bit(copies(params).values()), path).unsure


def test_what_was_saved_without_names_is_not_warned_of(path):
    """There is nothing that could be compared, and nothing to be done about it."""
    params = parameters(TWINS)
    optimizer = CAME8bit(params.values())
    train(params, optimizer, 1)
    save_checkpoint(optimizer, path)
    for values in (copies(params).values(), copies(params).items()):
        assert not quiet(CAME8bit(values), path).unsure


def test_parameters_without_state_have_none_to_swap(path):
    params = parameters(TWINS)
    optimizer = CAME8bit(params.items())
    params["c"].grad = torch.ones(TWINS["c"])
    optimizer.step()
    save_checkpoint(optimizer, path)
    assert not quiet(CAME8bit(copies(params).values()), path).unsure
    params["a"].grad = torch.ones(TWINS["a"])
    optimizer.step()  # "b" could get the state of "a"
    save_checkpoint(optimizer, path)
    with pytest.warns(UserWarning, match=r"1 parameters have the shape of another one \(a\)"):
        load_checkpoint(CAME8bit(copies(params).values()), path)
