"""What something else has changed between steps: where parameters are, and their state."""

from copy import deepcopy

import pytest
import torch
from training import parameter, same_bits, with_gradient

from came8bit import CAME, CAME8bit

# --- where parameters are -------------------------------------------------------------------------


def move(param, target):
    param.data = target


COME_TOGETHER = {
    "tied": lambda one, other: move(other, one.data[:30]),
    "overlap": lambda one, other: move(other, one.data.view(-1)[400:].view(-1, 40)[:30]),
    "set_": lambda one, other: other.set_(one.detach()[:30]),
    "within": lambda one, other: move(other, torch.zeros(40).expand(30, 40)),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", COME_TOGETHER)
def test_parameters_that_come_to_share_memory_are_refused(how, steps):
    one, other = with_gradient(50, 40), with_gradient(30, 40)
    optimizer = CAME8bit([{"params": [with_gradient(7), one]}, {"params": [other]}])
    for _ in range(steps):
        optimizer.step()
    with torch.no_grad():
        COME_TOGETHER[how](one, other)
    before = [one.detach().clone(), other.detach().clone()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 2 .*share memory.* Nothing has been"):
            optimizer.step()
    assert torch.equal(one, before[0])
    assert torch.equal(other, before[1])
    other.data = other.data.contiguous().clone()
    optimizer.step()
    assert not torch.equal(one, before[0])


def test_parameters_may_move_apart_from_each_other():
    params = [with_gradient(8, 16) for _ in range(3)]
    optimizer = CAME8bit(params)
    optimizer.step()
    flat = torch.cat([param.detach().view(-1) for param in params])
    for param, part in zip(params, flat.split(128), strict=True):
        param.data = part.view(8, 16)
    optimizer.step()
    params[2].grad = None
    params[2].data = params[1].data  # takes its turn in the same place
    optimizer.step()
    optimizer.param_groups[0]["params"].append(with_gradient(3))
    optimizer.step()
    params[2].grad = params[1].grad
    with pytest.raises(ValueError, match=r"parameter 1 .* and parameter 2 .* share memory"):
        optimizer.step()


def test_memory_that_has_been_freed_is_not_shared():
    params = [parameter(4, 5) for _ in range(2)]
    for param in params:
        param.untyped_storage().resize_(0)
    CAME8bit(params)


# --- state that something else has changed --------------------------------------------------------


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def expanded(tensor):
    return tensor.view(-1)[:1].expand(tensor.numel()).view(tensor.shape)


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


CHANGES = {
    "numpy": (lambda value: value.numpy(), "ndarray"),
    "None": (lambda value: None, "NoneType"),
    "wider": (lambda value: value.double(), "torch.float64"),
    "cut": (lambda value: value.view(-1)[:1], r"shape \(1,\)"),
    "strided": (strided, r"has strides \(\d+, 2\), expected a contiguous tensor"),
    "expanded": (expanded, r"has strides \(\d+, 0\)"),
    "sparse": (lambda value: value.to_sparse(), "has layout torch.sparse_coo"),
    "negated": (lambda value: torch._neg_view(-value), "is a view with the sign changed"),
    "meta": (lambda value: value.to("meta"), "is on meta, expected cpu"),
    "freed": (freed, "has lost its memory"),
}
OF_ANY_KIND = ("numpy", "None", "wider", "meta", "freed")  # counters, too, which have one element
CHANGED = [
    (paged, change, name)
    for change in CHANGES
    for name in ("absmax", "exp_avg_sq_row", "exp_avg_res_col", "step")
    for paged in (False, True)
    if (name != "step" or change in OF_ANY_KIND) and not (paged and name == "absmax")
]


def with_steps(paged, monkeypatch):
    monkeypatch.setattr("came8bit.paging.pages.MIN_PAGE_BYTES", 0)
    params = [with_gradient(64, 64), with_gradient(64, 80)]
    optimizer = CAME(params, optim_bits=8, is_paged=paged)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(("paged", "change", "name"), CHANGED)
def test_state_of_the_wrong_kind_is_named(paged, change, name, monkeypatch):
    (_, second), optimizer = with_steps(paged, monkeypatch)
    act, said = CHANGES[change]
    state = optimizer.state[second]
    state[name] = act(state[name])
    before = second.detach().clone()
    wanted = rf"state of parameter 1 \(shape \(64, 80\)\) does not fit: .*{said}"
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()
    with pytest.raises(ValueError, match=wanted):
        optimizer.step_parameter(second, optimizer.param_groups[0], 1)
    assert torch.equal(before, second)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["exp_avg_sq_col", "rms_ratio", "skipped"])
def test_a_lost_buffer_is_named(name, paged, monkeypatch):
    (_, second), optimizer = with_steps(paged, monkeypatch)
    del optimizer.state[second][name]
    with pytest.raises(ValueError, match=r"state of parameter 1 .* does not fit: got buffers \["):
        optimizer.step()


def test_a_refused_step_changes_no_state(monkeypatch):
    params, optimizer = with_steps(False, monkeypatch)
    optimizer.state[params[1]]["exp_avg"] = strided(optimizer.state[params[1]]["exp_avg"])
    before = deepcopy([{"p": p.data, **optimizer.state[p]} for p in params])
    with pytest.raises(ValueError, match="exp_avg has strides"):
        optimizer.step()
    for old, param in zip(before, params, strict=True):
        for name, value in {"p": param.data, **optimizer.state[param]}.items():
            assert same_bits(value, old[name]), name


def test_state_that_parameters_share_is_refused(monkeypatch):
    """A step would count twice, and change twice what it finds the second time."""
    params, optimizer = with_steps(False, monkeypatch)
    states = [optimizer.state[param] for param in params]
    states[1]["step"] = states[0]["step"]
    with pytest.raises(ValueError, match="step of parameter 0 and step of parameter 1 share"):
        optimizer.step()
    states[1]["step"] = states[0]["step"].clone()
    optimizer.step()
    assert [int(state["step"]) for state in states] == [2, 2]


def test_a_parameter_without_its_name_is_refused():
    optimizer = CAME([("w", with_gradient(64, 64))])
    optimizer.param_groups[0]["params"].append(with_gradient(3))
    with pytest.raises(
        ValueError, match=r"1 names in a group of more parameters; add_param_group\(\)"
    ):
        optimizer.step()
