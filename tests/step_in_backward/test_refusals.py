"""Where stepping in backward cannot do what is asked: an error that says so, never a wrong step."""

import contextlib
import math

import pytest
import torch
from accelerate import Accelerator
from small_nets import loss_of, made, make_net, train
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import assert_same, snapshot

import came8bit
from came8bit.step_in_backward import ReleasedGradient

# --- gradients that are gone ----------------------------------------------------------------------


def unscale(params):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.SGD(params))


def unscale_only(params):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD(params))


READERS = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 1e-3),
    "clip_grad_norm_, no foreach": lambda p: nn.utils.clip_grad_norm_(p, 1e-3, foreach=False),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 1.0),
    "another norm": lambda params: nn.utils.get_total_norm([p.grad for p in params], 1.0),
    "infinity norm": lambda params: nn.utils.clip_grad_norm_(params, 1.0, math.inf),
    "detached": lambda params: params[0].grad.detach().abs().max(),
    "data": lambda params: params[0].grad.data.sum(),
    "to another dtype": lambda params: params[0].grad.double(),
    "GradScaler": unscale,
    "GradScaler, unscale_ alone": unscale_only,
}


@pytest.mark.parametrize("name", READERS)
def test_reading_a_released_gradient(name):
    net, optimizer, _ = made()
    loss_of(net, 0).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step_in_backward") as caught:
        READERS[name](list(net.parameters()))
    for alternative in ("clip_threshold", "bfloat16", r"release.accumulate()"):
        assert alternative in str(caught.value)
    # It comes too late to prevent anything, and says so.
    assert "already applied and freed this gradient, neither clipped nor" in str(caught.value)
    assert_same(before, snapshot(optimizer))
    optimizer.step()  # training can go on
    train(net, optimizer)


def test_accelerate():
    accelerator = Accelerator(cpu=True)
    net = make_net()
    net, optimizer = accelerator.prepare(net, came8bit.CAME8bit(net.parameters()))
    came8bit.step_in_backward(optimizer)
    accelerator.backward(loss_of(net, 0))
    with pytest.raises(RuntimeError, match="clip_threshold"):
        accelerator.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.scaler = torch.amp.GradScaler("cpu")
    optimizer.optimizer._release.remove()
    with pytest.raises(RuntimeError, match="bf16"):
        came8bit.step_in_backward(optimizer)
    optimizer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    came8bit.step_in_backward(optimizer)


@pytest.mark.parametrize("module", [True, False])
def test_setting_released_gradients_to_zero_does_no_harm(module):
    """Also between backward() and step(), where they are placeholders."""
    net, optimizer, _ = made()
    expected = make_net()
    train(expected, ordinary := came8bit.CAME8bit(expected.parameters(), lr=1e-3))
    for i in range(4):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, i).backward()
        (net if module else optimizer).zero_grad(set_to_none=False)
        assert type(net.head.weight.grad) is ReleasedGradient
        optimizer.step()
    assert_same(snapshot(ordinary), snapshot(optimizer))


def test_setting_many_gradients_to_zero_leaves_out_the_released_ones():
    net, optimizer, _ = made()
    loss_of(net, 0).backward()
    others = [torch.ones(3), torch.ones(2, 2)]
    torch._foreach_zero_([others[0], net.head.weight.grad, others[1]])
    assert not any(other.any() for other in others)
    net.first.up.weight.grad = torch.ones_like(net.first.up.weight)
    before = net.first.down.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, net.first.down.weight)


# --- second gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_a_second_backward_before_step(zero_grad, accumulate):
    net, optimizer, release = made()
    loss_of(net, 0).backward()
    before = snapshot(optimizer)
    if zero_grad:
        optimizer.zero_grad()
    with (
        release.accumulate(accumulate),
        pytest.raises(RuntimeError, match=r"second gradient before optimizer.step\(\)") as caught,
    ):
        loss_of(net, 1).backward()
    assert "all but the last inside `with release.accumulate():`" in str(caught.value)
    assert "meant to be discarded" in str(caught.value)
    assert_same(before, snapshot(optimizer))
    optimizer.zero_grad()
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    # The step is over; the next one is as if the refused backward had never been.
    other = make_net()
    expected = came8bit.CAME8bit(other.parameters(), lr=1e-3)
    train(other, expected, steps=1)
    assert_same(train(other, expected, first=1), train(net, optimizer, first=1))


@pytest.mark.parametrize("how", ["accumulate", "frozen"])
def test_gradients_that_are_thrown_away(how):
    """A generator learns through its discriminator, whose own gradients nobody wants."""

    def loop(released):
        torch.manual_seed(0)
        generator, judge = nn.Linear(64, 64), nn.Linear(64, 64)
        ours, its = (came8bit.CAME8bit(net.parameters()) for net in (generator, judge))
        release = None
        if released:
            came8bit.step_in_backward(ours)
            release = came8bit.step_in_backward(its)
        for _ in range(3):
            noise = torch.randn(8, 64)
            judge(generator(noise).detach()).square().mean().backward()
            its.step()
            its.zero_grad()
            before = [p.detach().clone() for p in judge.parameters()]
            judge.requires_grad_(how != "frozen")
            with release.accumulate(how == "accumulate") if release else contextlib.nullcontext():
                judge(generator(noise)).abs().mean().backward()
            its.zero_grad()
            judge.requires_grad_()
            ours.step()
            ours.zero_grad()
            assert all(torch.equal(*pair) for pair in zip(judge.parameters(), before, strict=True))
        return snapshot(ours), snapshot(its)

    for expected, got in zip(loop(False), loop(True), strict=True):
        assert_same(expected, got)


def test_several_segments_of_reentrant_checkpointing_with_the_same_parameter():
    net, optimizer, _ = made(make_net(shared=True, reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(net, 0).backward()
    # Not silent, and not twice.
    assert int(optimizer.state[net.first.down.weight]["step"]) == 1


def test_a_parameter_inside_and_outside_of_reentrant_checkpointing():
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = came8bit.CAME8bit([weight])
    came8bit.step_in_backward(optimizer)
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False|modified by an inplace operation"):
        (checkpoint(lambda y: y @ weight, x @ weight, use_reentrant=True) @ weight).sum().backward()
    assert int(optimizer.state[weight]["step"]) == 1


def test_one_parameter_of_two_optimizers():
    param = nn.Parameter(torch.randn(64, 64))
    optimizers = [came8bit.CAME8bit([param]) for _ in range(2)]
    for optimizer in optimizers:
        came8bit.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="another optimizer that steps in backward"):
        param.sum().backward()
    assert not optimizers[1].state


# --- graphs that are needed again -----------------------------------------------------------------


def test_a_graph_that_is_walked_twice_notices_the_update():
    net, optimizer, _ = made()
    loss = loss_of(net, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # As much as was ready before autograd noticed: the loss's own layer at most.
    changed = [
        not torch.equal(p, q) for p, q in zip(before[0], snapshot(optimizer)[0], strict=True)
    ]
    assert not any(changed)


def test_a_use_without_gradient_notices_the_update():
    """Autograd waits for all uses that need the gradient; a detached one is not among them."""
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = came8bit.CAME8bit([weight])
    came8bit.step_in_backward(optimizer)
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x @ weight.detach() @ weight).sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph():
    net, optimizer, release = made()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*torch\.autograd\.grad"):
        loss_of(net, 0).backward(create_graph=True)
    assert_same(before, snapshot(optimizer))
    release.remove()
    net.zero_grad()


def test_autograd_grad_updates_nothing():
    net, optimizer, _ = made()
    before = snapshot(optimizer)
    grads = torch.autograd.grad(loss_of(net, 0), list(net.parameters()))
    assert all(type(grad) is torch.Tensor for grad in grads)
    assert_same(before, snapshot(optimizer))
    train(net, optimizer)
    # A gradient penalty: differentiated twice, then one backward pass.
    (grad,) = torch.autograd.grad(loss_of(net, 5), net.first.up.weight, create_graph=True)
    (loss_of(net, 5) + grad.square().sum()).backward()
    optimizer.step()


# --- arguments ------------------------------------------------------------------------------------


def test_closures():
    """Lightning passes one to every step; its backward() updates."""
    net, optimizer, _ = made()
    expected = make_net()
    ordinary = came8bit.CAME8bit(expected.parameters(), lr=1e-3)
    for i in range(3):
        losses = []
        for model, stepped in ((net, optimizer), (expected, ordinary)):

            def closure(model=model, stepped=stepped, i=i):
                stepped.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                return loss

            losses.append(stepped.step(closure))
        assert torch.equal(*losses)
    assert all(p.grad is None for p in net.parameters())
    assert_same(snapshot(ordinary), snapshot(optimizer))


def test_a_wrapper_that_is_a_subclass_of_what_it_wraps():
    """As Fabric's and Lightning's are."""
    net, optimizer, release = made()
    release.remove()

    class Wrapper(came8bit.CAME8bit):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    with came8bit.step_in_backward(Wrapper(optimizer)):
        train(net, optimizer)
        assert optimizer._release is not None


def test_what_is_not_an_optimizer_of_ours():
    with pytest.raises(TypeError, match="got AdamW, expected one of came8bit's optimizers"):
        came8bit.step_in_backward(torch.optim.AdamW([nn.Parameter(torch.ones(2))]))
    _, optimizer, release = made()
    with pytest.raises(ValueError, match="already"):
        came8bit.step_in_backward(optimizer)
    release.remove()
    came8bit.step_in_backward(optimizer)


def test_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    net, optimizer, _ = made()
    train(net, optimizer)
    before = snapshot(optimizer)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="gradients of the 2 processes"):
        loss_of(net, 0).backward()
    assert_same(before, snapshot(optimizer))
    with pytest.raises(RuntimeError, match="gradients of the 2 processes"):
        made()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_distributed_data_parallel_reads_the_gradient_afterwards(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        net, optimizer, _ = made()
        parallel = nn.parallel.DistributedDataParallel(net)
        message = r"Do not wrap the model in DistributedDataParallel"
        with pytest.raises(RuntimeError, match=message) as caught:
            loss_of(parallel, 0).backward()
        assert "clip" not in str(caught.value)
        assert len(optimizer.state) < len(list(net.parameters()))
        # The way that the message names: all gradients are kept.
        net, optimizer, release = made()
        parallel = nn.parallel.DistributedDataParallel(net)
        for i in range(4):
            optimizer.zero_grad()
            with release.accumulate():
                loss_of(parallel, i).backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    expected = make_net()
    train(expected, ordinary := came8bit.CAME8bit(expected.parameters(), lr=1e-3))
    assert_same(snapshot(ordinary), snapshot(optimizer))


def test_a_later_hook_that_reads_the_gradient():
    net, optimizer, _ = made()
    net.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.norm())
    with pytest.raises(RuntimeError, match="register hooks on gradients before step_in_backward"):
        loss_of(net, 0).backward()
    assert int(optimizer.state[net.head.weight]["step"]) == 1


@pytest.mark.parametrize("accumulated", [True, False])
@pytest.mark.parametrize("lr", [math.nan, -1.0, "fast"])
def test_options_are_checked_before_anything_changes(lr, accumulated):
    net, optimizer, release = made()
    train(net, optimizer)
    if accumulated:
        with release.accumulate():
            loss_of(net, 0).backward()
    optimizer.param_groups[0]["lr"] = lr
    before = snapshot(optimizer)[:2]
    with pytest.raises(ValueError, match=r"got lr .* no parameter has been changed"):
        loss_of(net, 0).backward()
    after = snapshot(optimizer)[:2]
    assert_same((*before, None), (*after, None))
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.zero_grad()
    train(net, optimizer)
