"""Groups by rule, and bitsandbytes' overrides by parameter and by module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from came8bit import CAME8bit, GlobalOptimManager
from came8bit.param_groups import (
    ADAPM,
    EMBEDDINGS_IN_32_BITS,
    VECTORS_WITHOUT_DECAY,
    divide_for_muon,
    groups_by_rule,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.norm = nn.LayerNorm(64)
        self.v_proj = nn.Linear(64, 64)
        self.o_proj = nn.Linear(64, 64, bias=False)
        self.lm_head = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.lm_head(self.o_proj(self.v_proj(self.norm(self.embed(x)))))


def step(net, optimizer):
    net(torch.arange(64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def options(optimizer, *names):
    """Option of every parameter, by name of the parameter."""
    return {
        name: tuple(group[option] for option in names)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_groups_by_rule():
    net = Net()
    net.o_proj.weight.requires_grad_(False)
    groups = groups_by_rule(net, VECTORS_WITHOUT_DECAY | EMBEDDINGS_IN_32_BITS)
    optimizer = CAME8bit(groups, weight_decay=0.1)
    vector = (8, 0.0)
    assert options(optimizer, "optim_bits", "weight_decay") == {
        "embed.weight": (32, 0.1),
        "lm_head.weight": (32, 0.1),
        "norm.weight": vector,
        "norm.bias": vector,
        "v_proj.bias": vector,
        "v_proj.weight": (8, 0.1),
    }
    step(net, optimizer)
    assert optimizer.state[net.embed.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[net.v_proj.weight]["exp_avg"].dtype == torch.int8


def test_a_tied_head_is_an_embedding():
    net = Net()
    net.lm_head.weight = net.embed.weight
    rules = {nn.Embedding: {"optim_bits": 4}, "lm_head.*": {"optim_bits": 32}}
    optimizer = CAME8bit(groups_by_rule(net, rules))
    assert options(optimizer, "optim_bits")["embed.weight"] == (32,)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_the_last_rule_decides():
    net = Net()
    optimizer = CAME8bit(groups_by_rule(net, ADAPM), lr=1e-3)
    bits = options(optimizer, "optim_bits")
    assert bits["embed.weight"] == bits["o_proj.weight"] == (0,)
    assert bits["v_proj.weight"] == (32,)
    assert bits["lm_head.weight"] == (4,)
    with pytest.raises(ValueError, match=r"'q_proj'.* match no parameter"):
        groups_by_rule(net, {"q_proj": {"optim_bits": 32}})


def test_muon_for_matrices():
    net = Net()
    matrices, rest = divide_for_muon(net)
    assert [name for name, _ in matrices] == ["v_proj.weight", "o_proj.weight"]
    optimizers = torch.optim.Muon(matrices, lr=1e-3), CAME8bit(rest, lr=1e-3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.arange(64)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all((p != before[name]).any() for name, p in net.named_parameters())


@pytest.fixture
def manager():
    yield (one := GlobalOptimManager.get_instance())
    one.initialize()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_overrides_of_a_user_of_bitsandbytes(manager, before, named):
    """Before the optimizer is made, as modules do, or after it, as in their example."""
    net = Net()

    def override():
        manager.register_parameters(net.parameters())
        manager.override_config(net.v_proj.weight, "optim_bits", 32)
        manager.override_config(
            [net.o_proj.weight, net.lm_head.weight],
            key_value_dict={"lr": 1e-5, "betas": (0.9, 0.98)},
        )
        manager.register_module_override(net.embed, "weight", {"optim_bits": 32})
        manager.register_module_override(net.o_proj, "bias", {"optim_bits": 32})

    if before:
        override()
    optimizer = CAME8bit(net.named_parameters() if named else net.parameters(), lr=1e-3)
    if not before:
        override()
    found = {
        id(param): (group["optim_bits"], group["lr"], group["betas"][1])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    expected = {
        "embed.weight": (32, 1e-3, 0.999),
        "v_proj.weight": (32, 1e-3, 0.999),
        "o_proj.weight": (8, 1e-5, 0.98),
        "lm_head.weight": (8, 1e-5, 0.98),
    }
    for name, param in net.named_parameters():
        assert found[id(param)] == expected.get(name, (8, 1e-3, 0.999)), name
    if named:
        params = dict(net.named_parameters())
        for group in optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                assert params[name] is param
    step(net, optimizer)
    assert optimizer.state[net.embed.weight]["exp_avg"].dtype == torch.float32
    assert len(optimizer.param_groups) == 3 if before else len(optimizer.param_groups) <= 4
    other = CAME8bit([torch.nn.Parameter(torch.ones(3))])
    assert len(other.param_groups) == 1


def test_initialize_forgets_overrides(manager):
    net = Net()
    manager.override_config(net.v_proj.weight, "optim_bits", 32)
    manager.register_module_override(net.embed, "weight", {"optim_bits": 32})
    manager.initialize()
    optimizer = CAME8bit(net.parameters(), lr=1e-3)
    assert len(optimizer.param_groups) == 1
    manager.override_config(net.v_proj.weight, "optim_bits", 32)  # reaches it all the same
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_overrides_of_a_module_are_for_parameters_that_it_gets_later(manager, how):
    with torch.device("meta"):
        net = Net()
    manager.register_module_override(net.embed, "weight", {"optim_bits": 32})
    manager.register_module_override(net.embed, "weight", {"lr": 1e-5})
    manager.register_module_override(net.o_proj, "weight", {"lr": 1e-5})
    if how == "to_empty":
        net.to_empty(device="cpu")
    else:
        net.load_state_dict(Net().state_dict(), assign=True)
    manager.override_config(net.o_proj.weight, "lr", 1e-6)  # the last one decides
    optimizer = CAME8bit(net.named_parameters(), lr=1e-3)
    found = options(optimizer, "optim_bits", "lr")
    expected = {"embed.weight": (32, 1e-5), "o_proj.weight": (8, 1e-6)}
    assert found == {name: expected.get(name, (8, 1e-3)) for name in found}


@pytest.mark.parametrize("why", ["has stepped it", "has a scheduler"])
def test_overrides_that_come_too_late_are_for_the_next_optimizer(manager, why):
    net = Net()
    optimizer = CAME8bit(net.parameters(), lr=1e-3)
    if "step" in why:
        step(net, optimizer)
    else:
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.warns(UserWarning, match=f"{why}, so it stays as it is"):
        manager.override_config(net.embed.weight, "optim_bits", 32)
    assert [len(group["params"]) for group in optimizer.param_groups] == [7]
    later = CAME8bit(net.parameters(), lr=1e-3)
    assert sorted(len(group["params"]) for group in later.param_groups) == [1, 6]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [("optim_bits", 7, ValueError), ("is_sparse", True, TypeError), ("amsgrad", True, TypeError)],
)
def test_overrides_are_checked(manager, key, value, error):
    net = Net()
    optimizer = CAME8bit(net.parameters(), lr=1e-3)
    with pytest.raises(error, match=key):
        manager.override_config(net.embed.weight, key, value)
    assert [len(group["params"]) for group in optimizer.param_groups] == [7]
    manager.override_config(net.embed.weight, "amsgrad", False)
    assert len(optimizer.param_groups) == 1
