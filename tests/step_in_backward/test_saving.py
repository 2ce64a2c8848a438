"""Saving, copying and leaving an optimizer that steps in backward."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_nets import loss_of, make_net, train
from training import assert_same, snapshot

import came8bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("makes", [("dense", "dense"), ("paged", "dense"), ("dense", "paged")])
def test_resuming(before, after, dtype, makes):
    classes = {"dense": came8bit.CAME8bit, "paged": came8bit.PagedCAME8bit}
    net = make_net(dtype)
    expected = train(net, came8bit.CAME8bit(net.parameters()), steps=8)

    net = make_net(dtype)
    optimizer = classes[makes[0]](net.parameters())
    if before:
        came8bit.step_in_backward(optimizer)
    train(net, optimizer)
    saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))

    net = make_net(dtype)
    optimizer = classes[makes[1]](net.parameters(), lr=0.5)
    if after:
        came8bit.step_in_backward(optimizer)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(net, optimizer, first=4)
    if makes[1] == "paged":  # optimizer.state has only what stays on the device
        dense = came8bit.CAME8bit(net.parameters())
        dense.load_state_dict(optimizer.state_dict())
        optimizer = dense
    assert_same(expected, snapshot(optimizer))


@pytest.mark.parametrize("cls", [came8bit.CAME8bit, came8bit.PagedCAME8bit])
@pytest.mark.parametrize("how", ["load_state_dict", "load_checkpoint"])
@pytest.mark.parametrize("left", ["whole pass", "failed pass", "accumulated"])
def test_loading_during_a_step_begins_a_new_one(left, how, cls, tmp_path):
    """Also without zero_grad(), which nobody needs who steps in backward."""
    net = make_net()
    optimizer = cls(net.parameters())
    release = came8bit.step_in_backward(optimizer)
    train(net, optimizer, steps=1)
    file = tmp_path / "checkpoint"
    came8bit.save_checkpoint(optimizer, file)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    expected = train(net, optimizer, first=1, zero_grad=False)
    if left == "failed pass":
        optimizer.param_groups[0]["nonfinite"] = "raise"
        net.first.up.weight.register_hook(lambda grad: grad * torch.nan)
        with pytest.raises(FloatingPointError):
            loss_of(net, 99).backward()
        net.first.up.weight._backward_hooks.clear()
        optimizer.param_groups[0]["nonfinite"] = "skip"
        assert net.first.up.weight.grad.isnan().any()
    else:
        with release.accumulate(left == "accumulated"):
            loss_of(net, 99).backward()
    net.load_state_dict(saved[0])
    if how == "load_checkpoint":
        came8bit.load_checkpoint(optimizer, file)
    else:
        optimizer.load_state_dict(saved[1])
    assert all(p.grad is None for p in net.parameters())
    assert_same(expected, train(net, optimizer, first=1, zero_grad=False))


def test_loading_between_steps_leaves_gradients_alone():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters())
    came8bit.step_in_backward(optimizer)
    train(net, optimizer)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    optimizer.load_state_dict(optimizer.state_dict())
    assert net.head.weight.grad.all()


def test_copies_step_in_the_ordinary_way():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters())
    came8bit.step_in_backward(optimizer)
    train(net, optimizer)
    copied_net, copied = copy.deepcopy((net, optimizer))
    loss_of(copied_net, 4).backward()
    before = [p.detach().clone() for p in copied_net.parameters()]
    assert all(type(p.grad) is torch.Tensor for p in copied_net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(copied_net.parameters(), before, strict=True))
    copied.step()
    assert_same(train(net, optimizer, first=4, steps=1), snapshot(copied))
    assert pickle.loads(pickle.dumps(optimizer))._release is None


def test_removing():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters())
    with came8bit.step_in_backward(optimizer) as release:
        train(net, optimizer, steps=2)
        loss_of(net, 2).backward()
    assert all(p.grad is None for p in net.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    release.remove()
    train(net, optimizer, first=3, steps=1)
    optimizer.zero_grad()
    loss_of(net, 4).backward()
    assert all(type(p.grad) is torch.Tensor for p in net.parameters())
    optimizer.step()
    other = make_net()
    expected = train(other, came8bit.CAME8bit(other.parameters()), steps=5)
    assert_same(expected, snapshot(optimizer))
    came8bit.step_in_backward(optimizer)
    release.remove()  # of the first: the second stays
    assert optimizer._release is not None


@pytest.mark.parametrize("keep", ["nothing", "handle", "optimizer"])
@pytest.mark.parametrize("stepped", [True, False])
def test_nothing_keeps_the_model_alive(keep, stepped):
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters())
    release = came8bit.step_in_backward(optimizer)
    train(net, optimizer)
    if not stepped:
        loss_of(net, 4).backward()
    kept = {"nothing": None, "handle": release, "optimizer": optimizer}[keep]
    alive = weakref.ref(net), weakref.ref(net.first.up.weight), weakref.ref(optimizer)
    del net, optimizer, release
    gc.collect()
    expected = [None] * 3
    if keep == "optimizer":
        expected[1:] = kept.param_groups[0]["params"][3], kept
    elif keep == "handle" and not stepped:
        kept.remove()
    assert [ref() for ref in alive] == expected


def test_a_dropped_optimizer_leaves_an_ordinary_model():
    net = make_net()
    release = came8bit.step_in_backward(came8bit.CAME8bit(net.parameters()))
    gc.collect()
    loss_of(net, 0).backward()
    assert all(type(p.grad) is torch.Tensor for p in net.parameters())
    release.remove()
