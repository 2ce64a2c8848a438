"""Stepping in backward: bytes of gradients that exist at a time, counted and as resident memory.

Each measurement is made for ordinary steps, too; there it has to find all gradients at once, or it
could not find them here.
"""

import sys

import pytest
import torch
from small_nets import loss_of, make_net
from torch import nn

import came8bit
from benchmarks.process_memory import MAPPED, in_a_process
from came8bit.step_in_backward import ReleasedGradient


def live_bytes(params):
    grads = [p.grad for p in params if type(p.grad) is torch.Tensor]
    return sum(g.untyped_storage().nbytes() for g in grads)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_one_gradient_at_a_time(reentrant):
    peaks = []
    for released in (False, True):
        net = make_net(tied=False, reentrant=reentrant)
        params = list(net.parameters())
        live = []
        for p in params:  # before the release's own hooks, so they see the gradient in hand
            p.register_post_accumulate_grad_hook(
                lambda _, ps=params, out=live: out.append(live_bytes(ps))
            )
        optimizer = came8bit.CAME8bit(params)
        if released:
            came8bit.step_in_backward(optimizer)
        loss_of(net, 0).backward()
        assert len(live) == len(params)
        peaks.append(max(live))
        optimizer.step()
    everything = sum(p.nbytes for p in params)
    assert peaks[0] == everything
    assert peaks[1] == max(p.nbytes for p in params) < everything / 4


def test_the_gradient_in_hand_is_freed_by_the_hook():
    """Nobody else holds on to it, such as a traceback or the optimizer's list of work."""
    weights = [nn.Parameter(torch.randn(256, 256)) for _ in range(4)]
    optimizer = came8bit.CAME8bit(weights)
    came8bit.step_in_backward(optimizer)
    x = torch.ones(1, 256)
    for weight in weights:
        x = x @ weight
    freed = []

    class Watched(torch.Tensor):
        def __del__(self):
            freed.append(1)

    def watch(param):
        param.grad = param.grad.as_subclass(Watched)

    # torch runs hooks in the order of registration; so these come first.
    optimizer._release.remove()
    for weight in weights:
        weight.register_post_accumulate_grad_hook(watch)
    counts = []
    came8bit.step_in_backward(optimizer)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: counts.append(len(freed)))
    x.sum().backward()
    assert all(type(weight.grad) is ReleasedGradient for weight in weights)
    assert counts == [1, 2, 3, 4]


_MEASURE = """
    import torch
    import came8bit

    released, layers, width = question
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = came8bit.CAME8bit(net.parameters())
    if released:
        came8bit.step_in_backward(optimizer)

    def step():
        optimizer.zero_grad()
        net(torch.ones(4, width)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    answer = peak_of(step), sum(p.nbytes for p in net.parameters())
"""


def step_peak(released, layers, width):
    """Peak bytes of a training step above the level before it; bytes of all gradients."""
    # glibc by default puts blocks of up to 32 MiB on its heap once one has been freed, where a hole
    # left by a gradient is a few bytes too small for the next; so they get mappings of their own.
    return in_a_process(_MEASURE, [released, layers, width], **MAPPED)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_resident_memory_of_a_training_step():
    # 24 gradients of 4 MiB; three at a time are left room for, with activations and workspace.
    layers, width = 24, 1024
    ordinary, everything = step_peak(False, layers, width)
    released, _ = step_peak(True, layers, width)
    assert ordinary > 0.9 * everything
    assert released < everything * 3 / layers
