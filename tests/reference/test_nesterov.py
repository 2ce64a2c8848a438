"""Corrected steps and Nesterov's direction against the written rule in float64."""

from __future__ import annotations

import warnings

import pytest
import tolerances
import torch
from training import gradients, run, same_bits, start

import came8bit
from came8bit import CAME, CAME8bit, CAME32bit
from came8bit.ops import libraries

LR = 1e-4
BETAS = (0.9, 0.999, 0.9999)


def in_float64(param, grads, *, correct, nesterov, cautious=False, decay=0.0, betas=BETAS):
    """The rule, written out from ``docs/internals/algorithm.md``."""
    p, (beta1, beta2, beta3) = param.detach().double(), betas
    m, factored = torch.zeros_like(p), p.dim() > 1
    r, big_r = torch.zeros_like(p[:, 0]) if factored else torch.zeros_like(p), 0.0
    c, big_c = 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        c1, c2, c3 = (
            1 - beta**s if correct else 1.0
            for beta, s in zip(betas, (t + nesterov, t, t), strict=True)
        )
        square = g * g + 1e-30
        if factored:
            r = beta2 * r + (1 - beta2) * square.mean(1)
            c = beta2 * c + (1 - beta2) * square.mean(0)
            u = g * (r.mean() / r).sqrt()[:, None] / (c / c2).sqrt()
        else:
            r = beta2 * r + (1 - beta2) * square
            u = g / (r / c2).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = beta1 * m + (1 - beta1) * u
        direction = (beta1 * m + (1 - beta1) * u if nesterov else m) / c1
        if factored:
            s = (u - m) ** 2 + 1e-16
            big_r = beta3 * big_r + (1 - beta3) * s.mean(1)
            big_c = beta3 * big_c + (1 - beta3) * s.mean(0)
            direction = direction * (big_r.mean() / big_r).sqrt()[:, None] / (big_c / c3).sqrt()
        if cautious:
            mask = m * g > 0
            direction = direction * mask / max(mask.double().mean().item(), 1e-3)
        p = p - LR * decay * p - LR * direction
    return p


@pytest.mark.parametrize("shape", [(300,), (64, 48)], ids=str)
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "as published"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("grads", "options"),
    [
        ({}, {}),
        ({"spikes": True}, {"weight_decay": 5.0}),
        ({"noise": 0.1}, {"cautious": True}),
        ({}, {"betas": (0.0, 0.999, 0.9999)}),
        ({}, {"betas": (0.95, 0.99, 0.999), "cautious": True, "weight_decay": 5.0}),
    ],
    ids=["default", "spikes", "cautious", "no momentum", "all"],
)
def test_parity_with_float64(shape, nesterov, correct, grads, options):
    sequence = list(gradients(shape, **grads))
    before, param = start(shape), start(shape)
    optimizer = CAME32bit([param], lr=LR, bias_correction=correct, nesterov=nesterov, **options)
    run(optimizer, param, sequence)
    exact = in_float64(
        before,
        sequence,
        correct=correct,
        nesterov=nesterov,
        cautious=options.get("cautious", False),
        decay=options.get("weight_decay", 0.0),
        betas=options.get("betas", BETAS),
    )
    travelled = (exact - before.double()).norm()
    # Decay rounds the parameter a second time. A smaller one than here takes nearly the same
    # fraction of a unit at every step: its rounding errors add up instead of averaging out.
    rounding = 2**0.5 * tolerances.PARITY_ROUNDING * exact.norm()
    bound = tolerances.PARITY_DISTANCE * travelled + rounding
    assert (param.double() - exact).norm() <= bound


def test_direction_is_a_mean_of_all_updates():
    """A constant gradient of a vector: the corrected direction is 1 at every step."""
    param = torch.zeros(8, requires_grad=True)
    optimizer = CAME32bit([param], lr=LR, bias_correction=True, nesterov=True)
    for t in range(1, 31):
        run(optimizer, param, [torch.ones(8)])
        assert torch.allclose(param, torch.full((8,), -LR * t), rtol=1e-5)


def test_without_momentum_there_is_nothing_to_look_ahead_to():
    grads = list(gradients((64, 48), steps=5))
    with_it, without = start((64, 48)), start((64, 48))
    betas = (0.0, 0.999, 0.9999)
    run(CAME32bit([with_it], lr=LR, betas=betas, nesterov=True), with_it, grads)
    run(CAME32bit([without], lr=LR, betas=betas), without, grads)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_that_of_the_rule_without_it(bits, dtype):
    """Only the parameter moves otherwise: momentum and statistics keep their bits."""
    grads = list(gradients((48, 128), steps=6))
    with_it, without = start((48, 128), dtype), start((48, 128), dtype)
    options = {"lr": LR, "optim_bits": bits, "min_8bit_size": 0, "bias_correction": True}
    got = run(CAME([with_it], nesterov=True, **options), with_it, grads)
    wanted = run(CAME([without], **options), without, grads)
    assert not torch.equal(with_it, without)
    for name, value in wanted.items():
        assert same_bits(got[name], value), name


def test_old_states_were_not_made_with_it():
    """A state without the option is continued without it, whatever the optimizer was made with."""
    param = start((8, 8))
    optimizer = CAME8bit([param], lr=LR)
    run(optimizer, param, list(gradients((8, 8), steps=2)))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["nesterov"]
    other = CAME8bit([start((8, 8))], lr=LR, nesterov=True)
    other.load_state_dict(saved)
    assert other.param_groups[0]["nesterov"] is False


def test_an_option_that_no_kernel_has_takes_the_reference_and_that_is_said(monkeypatch):
    """On whatever device, with the same bits; a kernel never sees the option and ignores it."""
    monkeypatch.setattr(libraries, "_warned", set())
    grad = next(gradients((64, 80), steps=1))
    params = [start((64, 80), dtype=torch.bfloat16) for _ in range(2)]
    optimizers = [CAME8bit([param], lr=LR, nesterov=True) for param in params]
    for param in params:
        param.grad = grad.to(param.dtype)
    optimizers[0].step()
    monkeypatch.setattr(libraries, "REFERENCE_ONLY", {"cpu": (("nesterov", True),)})
    assert came8bit.kernel_status().reference_only == ("nesterov=True on CPU",)
    with pytest.warns(RuntimeWarning, match="CPU kernels do not have nesterov=True yet"):
        optimizers[1].step()
    assert torch.equal(*params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers[1].step()
