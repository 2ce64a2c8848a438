"""Stepping in backward against ordinary stepping: the same bits, whatever the loop does."""

import contextlib
import warnings

import pytest
import torch
from accelerate import Accelerator
from small_nets import WIDTH, loss_of, make_net, tokens, train
from torch import nn
from training import assert_same, in_threads, snapshot

import came8bit
from came8bit.step_in_backward import ReleasedGradient


def both(loop, *, net=None, make=came8bit.CAME8bit, **options):
    """What ``loop(net, optimizer, release)`` leaves without and with stepping in backward."""
    results = []
    for released in (False, True):
        model = make_net(**(net or {}))
        optimizer = make(model.parameters(), **{"lr": 1e-3, **options})
        release = came8bit.step_in_backward(optimizer) if released else None
        loop(model, optimizer, release)
        results.append(snapshot(optimizer))
    return results


def accumulating(release, enabled=True):
    return release.accumulate(enabled) if release else contextlib.nullcontext()


OPTIONS = {
    "plain": {},
    "32 bits": {"make": came8bit.CAME32bit},
    "paged": {"make": came8bit.PagedCAME8bit},
    "paged, little room": {"make": came8bit.PagedCAME8bit, "page_budget": 20_000},
    "paged 32 bits": {"make": came8bit.PagedCAME32bit, "net": {"dtype": torch.bfloat16}},
    "bfloat16": {"net": {"dtype": torch.bfloat16}},
    "float16": {"net": {"dtype": torch.float16}},
    "nearest": {"net": {"dtype": torch.bfloat16}, "rounding": "nearest"},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "bias_correction": True},
    "raise": {"nonfinite": "raise"},
    "propagate": {"nonfinite": "propagate"},
    "tensor lr": {"lr": torch.tensor(1e-3)},
    "untied": {"net": {"tied": False}},
    "used twice": {"net": {"shared": True}},
    "checkpointing": {"net": {"reentrant": False}},
    "reentrant checkpointing": {"net": {"reentrant": True}},
    "checkpointing, used twice": {"net": {"shared": True, "reentrant": False}},
    "checkpointing in bfloat16": {"net": {"reentrant": False, "dtype": torch.bfloat16}},
}


def norm_of(params):
    """In double precision."""
    return torch.stack([p.grad.double().norm() for p in params if p.grad is not None]).norm().item()


def near(norm, expected):
    return norm.dtype == torch.float32 and norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how", ["all", "accumulated", "by hand", "frozen", "grown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [came8bit.CAME8bit, came8bit.PagedCAME8bit])
def test_norm_of_the_gradients(make, dtype, how):
    """Equal to clip_grad_norm_(inf), where gradients are kept and where they are freed."""
    nets = make_net(dtype=dtype), make_net(dtype=dtype)
    ordinary, optimizer = (make(net.parameters(), lr=1e-3) for net in nets)
    release = came8bit.step_in_backward(optimizer)
    assert ordinary.grad_norm() == release.grad_norm() == 0
    for t in range(2):
        for net in nets:
            if how == "frozen":
                net.head.weight.requires_grad_(False)
        if how == "grown" and t:
            for net, one in zip(nets, (ordinary, optimizer), strict=True):
                net.extra = nn.Parameter(torch.ones(70, 70, dtype=dtype))
                one.add_param_group({"params": [net.extra]})
        with release.accumulate(how == "accumulated"):
            for net in nets:
                loss = loss_of(net, t) + (net.extra.square().mean() if hasattr(net, "extra") else 0)
                loss.backward()
        if how == "by hand":
            grads = [torch.full_like(net.head.weight, 0.1) for net in nets]
            nets[0].head.weight.grad, nets[1].head.weight.grad = grads
        expected = norm_of(nets[0].parameters())
        if how not in ("accumulated", "by hand"):  # there is more to come in step()
            assert near(release.grad_norm(), expected)
            assert near(nn.utils.clip_grad_norm_(nets[1].parameters(), torch.inf), expected)
        ordinary.step()
        optimizer.step()
        ordinary.zero_grad()
        assert near(ordinary.grad_norm(), expected)
        if how != "by hand":
            assert near(release.grad_norm(), expected)
    optimizer.step()
    assert release.grad_norm() == 0


def test_norm_of_gradients_that_are_zero_or_not_finite():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters(), lr=1e-3)
    came8bit.step_in_backward(optimizer)
    (loss_of(net, 0) * 0).backward()
    assert nn.utils.clip_grad_norm_(net.parameters(), 1.0) == 0
    optimizer.step()
    (loss_of(net, 0) * torch.inf).backward()
    assert not optimizer.grad_norm().isfinite()


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_as_ordinary_steps(name, zero_grad):
    def loop(net, optimizer, release):
        # Who does not call zero_grad() gets fresh gradients all the same.
        train(net, optimizer, zero_grad=zero_grad or release is None)

    ordinary, released = both(loop, **OPTIONS[name])
    assert len(ordinary[1]) > 20
    assert_same(ordinary, released)


def test_parameters_are_updated_and_gradients_gone_before_backward_returns():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters())
    came8bit.step_in_backward(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    loss_of(net, 0).backward()
    for p, old in zip(net.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert int(optimizer.state[p]["step"]) == 1
        assert type(p.grad) is ReleasedGradient
        assert p.grad.nbytes == 0
        assert p.grad.shape == p.shape
        assert "ReleasedGradient" in repr(p.grad)
    updated = snapshot(optimizer)
    optimizer.step()
    assert_same(updated, snapshot(optimizer))
    assert all(p.grad is None for p in net.parameters())


def test_a_parameter_that_gets_its_gradient_in_two_places_is_stepped_once_with_the_sum():
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = came8bit.CAME8bit([weight])
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    came8bit.step_in_backward(optimizer)
    (2 * weight + 3 * weight.t()).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.full((8, 8), 5.0))
    assert int(optimizer.state[weight]["step"]) == 1


# --- schedulers, groups, frozen parameters --------------------------------------------------------


@pytest.mark.parametrize("first", ["scheduler", "release"])
def test_schedulers(first):
    def loop(net, optimizer, release):
        if release is not None and first == "scheduler":
            release.remove()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (i + 1) / 3)
        if release is not None and first == "scheduler":
            came8bit.step_in_backward(optimizer)
        train(net, optimizer, scheduler=scheduler)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ordinary, released = both(loop)
    assert ordinary[2][0]["lr"] == pytest.approx(5e-3 / 3)
    assert_same(ordinary, released)


def test_the_learning_rate_is_read_in_backward():
    net = make_net()
    optimizer = came8bit.CAME8bit(net.parameters(), lr=1e-3)
    came8bit.step_in_backward(optimizer)
    loss = loss_of(net, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in net.parameters()]
    loss.backward()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    loss_of(net, 0).backward()
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_groups_added_later():
    results = []
    for released in (False, True):
        net = make_net()
        optimizer = came8bit.CAME8bit(net.first.parameters(), lr=1e-3)
        if released:
            came8bit.step_in_backward(optimizer)
        train(net, optimizer)
        optimizer.add_param_group({"params": list(net.second.parameters()), "lr": 1e-2})
        net.zero_grad()
        loss_of(net, 4).backward()
        if released:
            assert all(type(p.grad) is ReleasedGradient for p in net.second.parameters())
            assert type(net.embedding.weight.grad) is torch.Tensor  # not the optimizer's
        optimizer.step()
        results.append(train(net, optimizer, first=5))
    assert_same(*results)


def test_parameters_frozen_at_first():
    results = []
    for released in (False, True):
        net = make_net()
        net.first.requires_grad_(False)
        optimizer = came8bit.CAME8bit(net.parameters())
        if released:
            came8bit.step_in_backward(optimizer)
        train(net, optimizer)
        assert not any(p.requires_grad for p in net.first.parameters())
        net.requires_grad_(True)
        net.second.requires_grad_(False)
        optimizer.zero_grad()
        loss_of(net, 4).backward()
        if released:
            assert all(type(p.grad) is ReleasedGradient for p in net.first.parameters())
        optimizer.step()
        results.append(train(net, optimizer, first=5, steps=3))
        assert all(int(optimizer.state[p]["step"]) == 4 for p in net.first.parameters())
    assert_same(*results)


def test_gradients_from_elsewhere_are_used_in_step():
    def loop(net, optimizer, release):
        del release
        for i in range(2):
            optimizer.zero_grad()
            loss_of(net, i).backward(inputs=[net.embedding.weight])
            net.first.up.weight.grad = torch.full_like(net.first.up.weight, 0.1)
            optimizer.step()

    ordinary, released = both(loop)
    assert_same(ordinary, released)


def test_several_losses_over_different_parameters_are_one_step():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = came8bit.CAME8bit([*first.parameters(), *second.parameters()])
    came8bit.step_in_backward(optimizer)
    first(torch.ones(1, 8)).sum().backward()
    second(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [1] * 4


# --- accumulation, accelerate ---------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [True, False])
def test_accumulating_gradients(zero_grad):
    def loop(net, optimizer, release):
        for i in range(0, 9, 3):
            if zero_grad or release is None:
                optimizer.zero_grad()
            for j in range(3):
                with accumulating(release, j < 2):
                    loss_of(net, i + j).backward()
            optimizer.step()

    assert_same(*both(loop))


def test_a_parameter_that_the_last_pass_misses_is_stepped_in_step():
    def loop(net, optimizer, release):
        with accumulating(release):
            loss_of(net, 0).backward()
        net.second(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()

    assert_same(*both(loop))


def test_global_norm_clipping_with_all_gradients_kept():
    def loop(net, optimizer, release):
        for i in range(3):
            optimizer.zero_grad()
            with accumulating(release):
                loss_of(net, i).backward()
            assert nn.utils.clip_grad_norm_(net.parameters(), 1e-3) > 1e-3
            optimizer.step()

    assert_same(*both(loop))


def test_grad_scaler_with_all_gradients_kept():
    def loop(net, optimizer, release):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(3):
            optimizer.zero_grad()
            with accumulating(release):
                scaler.scale(loss_of(net, i)).backward()
            scaler.step(optimizer)
            scaler.update()

    assert_same(*both(loop))


@pytest.mark.parametrize("wrap", ["before", "after"])
@pytest.mark.parametrize("passes", [1, 2])
def test_accelerate(passes, wrap):
    results = []
    for released in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
        net = make_net()
        optimizer = came8bit.CAME8bit(net.parameters(), lr=1e-3)
        release = came8bit.step_in_backward(optimizer) if released and wrap == "before" else None
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        prepared, wrapped, scheduler = accelerator.prepare(net, optimizer, scheduler)
        if released and wrap == "after":
            release = came8bit.step_in_backward(wrapped)
        for i in range(4):
            with accelerator.accumulate(prepared):
                with accumulating(release, not accelerator.sync_gradients):
                    accelerator.backward(loss_of(prepared, i))
                if released and accelerator.sync_gradients:
                    assert type(net.head.weight.grad) is ReleasedGradient
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        results.append(snapshot(optimizer))
    assert int(results[0][1][0, "step"]) == 4 // passes
    assert_same(*results)


# --- what the optimizer is told, threads ----------------------------------------------------------


def test_paged_state_hears_of_the_order_and_of_the_end(monkeypatch):
    calls = []
    net = make_net(tied=False)
    optimizer = came8bit.CAME8bit(net.parameters())
    store = optimizer._store
    monkeypatch.setattr(store, "set_prefetch_order", lambda params: calls.append(list(params)))
    monkeypatch.setattr(store, "flush", lambda: calls.append("flush"))
    release = came8bit.step_in_backward(optimizer)
    loss_of(net, 0).backward()
    assert calls == []
    optimizer.step()
    assert calls[0] == "flush"
    order = calls[1]
    assert sorted(map(id, order)) == sorted(map(id, net.parameters()))
    assert order[0] is net.head.weight
    assert order[-1] is net.embedding.weight
    release.remove()
    assert calls[2:] == ["flush", []]


def test_two_threads():
    """Backward passes of several devices run their hooks in threads of their own."""
    results = []
    for threaded in (False, True):
        nets = [make_net(), make_net()]
        optimizer = came8bit.CAME8bit([p for net in nets for p in net.parameters()])
        came8bit.step_in_backward(optimizer)
        for i in range(5):
            losses = [loss_of(net, i) for net in nets]
            if threaded:
                in_threads(*[loss.backward for loss in losses])
            else:
                for loss in losses:
                    loss.backward()
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(*results)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams():
    """Forward on one stream, backward from another: the same bits, many times over."""
    results = []
    for released in (False, True):
        net = make_net(reentrant=False).cuda()
        optimizer = came8bit.CAME8bit(net.parameters(), lr=1e-3)
        if released:
            came8bit.step_in_backward(optimizer)
        side = torch.cuda.Stream()
        for i in range(50):
            optimizer.zero_grad()
            batch = tokens(i).cuda()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = nn.functional.cross_entropy(net(batch), batch.roll(1))
            torch.cuda.current_stream().wait_stream(side)
            loss.backward()
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(*results)
