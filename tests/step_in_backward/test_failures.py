"""Backward passes that fail, and gradients that cannot be used, while stepping in backward."""

import math
import warnings

import pytest
import torch
from small_nets import Net, loss_of, made, train
from torch import nn
from training import snapshot

import came8bit
from came8bit.step_in_backward import ReleasedGradient


class Spoil(torch.autograd.Function):
    """The identity; its gradient is multiplied by NaN, or is an exception."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.error is not None:
            raise ctx.error
        return grad * math.nan, None


class Spoiled(Net):
    error = None
    on = True

    def forward(self, tokens):
        x = self.second(self.embedding(tokens))
        return self.head(self.first(Spoil.apply(x, self.error) if self.on else x))


def spoiled(error=None, **options):
    torch.manual_seed(0)
    net, optimizer, release = made(Spoiled(tied=False), **options)
    net.error = error
    return net, optimizer, release


def late(net):
    """Parameters whose gradients come first, and those behind the failure."""
    first = [*net.head.parameters(), *net.first.parameters()]
    return first, [*net.second.parameters(), *net.embedding.parameters()]


def changed(optimizer, params, before):
    old = dict(zip(map(id, optimizer.param_groups[0]["params"]), before[0], strict=True))
    return [not torch.equal(p, old[id(p)]) for p in params]


def test_skipping_gradients_that_are_not_finite():
    net, optimizer, _ = spoiled()
    before = snapshot(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(16):
            loss_of(net, i).backward()
            assert all(type(p.grad) is ReleasedGradient for p in net.parameters())
            optimizer.step()
    good, bad = late(net)
    assert all(changed(optimizer, good, before))
    assert not any(changed(optimizer, bad, before))
    assert optimizer.skipped_steps() == 16 * len(bad)
    assert [str(w.message).split()[1] for w in caught] == [str(16 * len(bad))]
    assert caught[0].filename == __file__


def test_raising_on_gradients_that_are_not_finite():
    net, optimizer, _ = spoiled(nonfinite="raise")
    before = snapshot(optimizer)
    message = r"parameter \d+ .* in backward\(\), after 6 of 12 parameters had been updated"
    with pytest.raises(FloatingPointError, match=message) as caught:
        loss_of(net, 0).backward()
    assert "othing has been changed" not in str(caught.value)
    good, bad = late(net)
    assert all(changed(optimizer, good, before))
    assert not any(changed(optimizer, bad, before))
    with pytest.raises(FloatingPointError, match="is not finite") as caught:
        optimizer.step()  # the bad gradient is still there
    assert "backward() has updated 6 of 12 parameters, the others have no" in str(caught.value)
    assert "othing has been changed" not in str(caught.value)
    optimizer.zero_grad()
    optimizer.step()
    net.on = False
    train(net, optimizer)


def test_backward_that_fails_in_the_middle():
    net, optimizer, _ = spoiled(error=KeyError("in the middle"))
    before = snapshot(optimizer)
    with pytest.raises(KeyError, match="in the middle"):
        loss_of(net, 0).backward()
    good, bad = late(net)
    assert all(changed(optimizer, good, before))
    assert not any(changed(optimizer, bad, before))
    optimizer.zero_grad()
    optimizer.step()
    net.on = False
    train(net, optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (good[0], bad[0])] == [5, 4]


def test_gradients_of_the_wrong_kind():
    embedding = nn.Embedding(64, 64, sparse=True)
    optimizer = came8bit.CAME8bit(embedding.parameters())
    came8bit.step_in_backward(optimizer)
    message = r"parameter 0 .*layout torch.sparse_coo.*backward\(\).* no parameter has been changed"
    with pytest.raises(TypeError, match=message):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert not optimizer.state
