"""What training tools do with an optimizer besides stepping it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training import assert_same, snapshot

import came8bit
from came8bit import CAME8bit, PagedCAME8bit
from came8bit.param_groups import GlobalOptimManager
from came8bit.state.store import stream_of


def make(cls=CAME8bit, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 120), torch.nn.ReLU(), torch.nn.Linear(120, 3))
    return net, cls(net.parameters(), **{"lr": 0.01, "bias_correction": True, **options})


def train(net, optimizer, steps, first=0):
    for t in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(t))
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("cls", [CAME8bit, PagedCAME8bit])
@pytest.mark.parametrize("how", ["materialize", "get_optimizer_state_dict", "tensor lr", "both"])
def test_state_that_is_made_beforehand_changes_nothing_of_what_follows(cls, how):
    expected = make(cls)
    train(*expected, 3)
    net, optimizer = make(cls)
    if how in ("materialize", "both"):
        optimizer.materialize()
    if how == "both":
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01
    elif how != "materialize":
        if how == "tensor lr":
            optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
        get_optimizer_state_dict(net, optimizer)
        optimizer.param_groups[0]["lr"] = 0.01
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}
    assert len(optimizer.state) == 4
    train(net, optimizer, 3)
    assert_same(snapshot(expected[1]), snapshot(optimizer))


def test_a_first_step_at_lr_0_counts_where_there_are_gradients():
    net, optimizer = make(lr=0.0)
    train(net, optimizer, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_materialize_leaves_frozen_parameters_and_state_alone():
    net, optimizer = make()
    net[0].weight.requires_grad_(False)
    optimizer.materialize()
    assert len(optimizer.state) == 3
    train(net, optimizer, 1)
    before = snapshot(optimizer)
    optimizer.materialize()
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("cls", [CAME8bit, PagedCAME8bit])
def test_step_parameter_from_hooks_of_a_training_loop(cls):
    expected = make(cls)
    train(*expected, 3)
    net, optimizer = make(cls)
    group = optimizer.param_groups[0]

    def hook_for(index):
        def hook(param):
            optimizer.step_parameter(param, group, index)
            param.grad = None

        return hook

    for index, param in enumerate(group["params"]):
        param.register_post_accumulate_grad_hook(hook_for(index))
    for t in range(3):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(t))
        net(x).square().sum().backward()
    for p, q in zip(net.parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_step_parameter_of_something_else():
    _, optimizer = make()
    group = optimizer.param_groups[0]
    for param, index in ((torch.nn.Parameter(torch.ones(3)), 0), (group["params"][0], 1)):
        with pytest.raises(ValueError, match="expected group\\['params'\\]"):
            optimizer.step_parameter(param, group, index)
    with pytest.raises(ValueError, match="of a group of this optimizer"):
        optimizer.step_parameter(group["params"][0], dict(group), 0)


def bf16_run(split, names):
    """Three steps of a bf16 model by one optimizer, or by one for each parameter."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(40, 40, bias=False) for _ in range(3))).bfloat16()
    net[1].weight.data.copy_(net[0].weight.data)
    net[2].weight.data.copy_(net[0].weight.data)
    members = list(net.named_parameters()) if names else list(net.parameters())
    parts = [[member] for member in members] if split else [members]
    options = [{} if names else {"stream": i} for i in range(len(parts))]
    optimizers = [CAME8bit(part, lr=1e-3, **o) for part, o in zip(parts, options, strict=True)]
    grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    for _ in range(3):
        for param in net.parameters():
            param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("names", [True, False])
def test_one_optimizer_per_parameter_has_the_bits_of_one_for_all(names):
    """Equal parameters with equal gradients draw bits of their own, the same in both ways."""
    together, apart = bf16_run(False, names), bf16_run(True, names)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[1], together[2])


@pytest.mark.parametrize("how", ["one group", "groups", "added", "divided", "regrouped"])
def test_no_two_parameters_of_an_optimizer_draw_the_same_bits(how):
    """Also where the stream that it counts from is set, and whatever the groups."""
    params = [torch.nn.Parameter(torch.ones(40, 40).bfloat16()) for _ in range(3)]
    manager = GlobalOptimManager.get_instance()
    if how == "divided":
        manager.override_config(params[1], "min_8bit_size", 0)
    groups = [{"params": [param]} for param in params]
    optimizer = CAME8bit(
        {"groups": groups, "added": params[:1]}.get(how, params), lr=1e-3, stream=2**32 - 2
    )
    if how == "added":
        optimizer.add_param_group({"params": params[1:]})
    if how == "regrouped":
        manager.override_config(params[0], "min_8bit_size", 0)
    streams, first = [], 0
    for group in optimizer.param_groups:
        members = len(group["params"])
        streams += [stream_of(group, first + i, first) for i in range(members)]
        first += members
    assert sorted(streams) == [0, 2**32 - 2, 2**32 - 1]


def test_streams_follow_names_without_wrappers():
    group = {"param_names": ["a.b", "module.a.b", "_orig_mod.a.b", "a.c"], "stream": None}
    first, *others, last = (stream_of(group, 10 + i, 10) for i in range(4))
    assert others == [first, first]
    assert last != first
    assert stream_of({"stream": None}, 12, 10) == 12
    assert stream_of({"stream": 2**32 - 1}, 12, 10) == 1


@pytest.mark.parametrize("cls", [CAME8bit, PagedCAME8bit])
def test_vectors_in_8_bits_are_matrices_of_one_row(cls, tmp_path):
    """Flat shards on request: the same bits, codes and scales; saved and loaded with them."""
    grads = [torch.randn(70_001, generator=torch.Generator().manual_seed(t)) for t in range(4)]

    def steps(param, optimizer, first, end):
        for grad in grads[first:end]:
            param.grad = grad.view_as(param).clone()
            optimizer.step()

    def made(*shape):
        param = torch.nn.Parameter(torch.ones(shape))
        return param, cls([param], quantize_vectors=True)

    (vector, mine), (row, other) = made(70_001), made(1, 70_001)
    steps(vector, mine, 0, 3)
    steps(row, other, 0, 3)
    states = [one.state_dict()["state"][0] for one in (mine, other)]
    for name, value in states[1].items():
        assert torch.equal(states[0][name].view_as(value), value), name
    assert states[0]["exp_avg"].dtype == torch.int8
    assert sum(t.nbytes for t in states[0].values()) < 5.017 * 70_001
    came8bit.save_checkpoint(mine, tmp_path / "file")
    steps(row, other, 3, 4)
    for load in (
        lambda one: one.load_state_dict(mine.state_dict()),
        lambda one: came8bit.load_checkpoint(one, tmp_path / "file"),
    ):
        again, optimizer = made(70_001)
        again.data.copy_(vector.data)
        load(optimizer)
        steps(again, optimizer, 3, 4)
        assert torch.equal(again, row.view_as(again))


def test_vectors_keep_their_bits_when_an_older_state_is_loaded():
    """State stays as it was made where optim_bits are the same, and older ones lack the option."""
    param = torch.nn.Parameter(torch.ones(8192))
    param.grad = torch.ones(8192)
    old = CAME8bit([param])
    old.step()
    state = old.state_dict()
    del state["param_groups"][0]["quantize_vectors"]
    new = CAME8bit([param], quantize_vectors=True)
    new.load_state_dict(state)
    assert new.state[param]["exp_avg"].dtype == torch.float32
    new.step()


CALLS = {
    "step_parameter": lambda o, g: o.step_parameter(g["params"][0], g, 0),
    "materialize": lambda o, g: o.materialize(),
    "grad_norm": lambda o, g: o.grad_norm(),
    "skipped_steps": lambda o, g: o.skipped_steps(),
    "load_state_dict": lambda o, g: o.load_state_dict(o.state_dict()),
    "backward": lambda o, g: (g["params"][0].sum().backward(), o.step()),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_compiled_loop_calls_is_not_compiled(name):
    net, optimizer = make()
    train(net, optimizer, 1)
    release = came8bit.step_in_backward(optimizer) if name == "backward" else None
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(
        lambda: CALLS[name](optimizer, optimizer.param_groups[0]), backend="eager"
    )
    for _ in range(3):
        compiled()
    # Of the lambda and of torch's wrapper of step(); of what is here there would be more.
    assert counters["frames"]["total"] <= 10
    if release is not None:
        release.remove()


@pytest.mark.parametrize("in_graph", [True, False])
def test_compiled_models_step_without_recompiling(in_graph):
    """Over a schedule, with the bits of eager steps; in a compiled function it is one break."""
    expected = make()
    net, optimizer = make()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(net, backend="eager")
    step = torch.compile(lambda: optimizer.step(), backend="eager") if in_graph else optimizer.step
    frames = []
    for t in range(20):
        for one in (expected[1], optimizer):
            one.param_groups[0]["lr"] = 0.01 / (t + 1)
        train(*expected, 1, first=t)
        optimizer.zero_grad()
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(t))
        compiled(x).square().sum().backward()
        step()
        frames.append(counters["frames"]["total"])
    assert_same(snapshot(expected[1]), snapshot(optimizer))
    assert frames[1] == frames[-1]
    assert len(counters["graph_break"]) == in_graph
