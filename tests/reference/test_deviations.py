"""Every deliberate deviation from CAME, by its number in ``docs/internals/algorithm.md``."""

from __future__ import annotations

import math
import re

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from training import gradients, relative, run, start

from came8bit import CAME, CAME8bit, CAME32bit
from came8bit.reference import update as reference
from came8bit.reference.quant import dequantize_blockwise
from came8bit.reference.reduction import CPU_TREE, CUDA_TREE
from came8bit.reference.rounding import random_bits, round_stochastic
from came8bit.state.layout import plan

SHAPES = [(300,), (64, 48), (6, 20, 33), (8, 4, 3, 3)]
LR = 1e-4


def test_deviation_1_view_with_fewest_bytes():
    shape = (16, 8, 3, 3)
    grads = list(gradients(shape, steps=5))
    conv, flat = start(shape), start((16, 72))
    with torch.no_grad():
        flat.copy_(conv.view(16, 72))
    run(CAME32bit([conv], lr=LR), conv, grads)
    run(CAME32bit([flat], lr=LR), flat, [g.view(16, 72) for g in grads])
    assert torch.equal(conv.view(16, 72), flat)
    official = start(shape)
    run(CAME32bit([official], lr=LR, factored_view="last_two"), official, grads)
    assert not torch.equal(conv, official)


def test_deviation_2_no_confidence_term_for_narrow_matrices():
    shape = (4096, 1)
    grads = list(gradients(shape, steps=5))
    narrow, vector = start(shape), start((4096,))
    state = run(CAME32bit([narrow], lr=LR), narrow, grads)
    run(CAME32bit([vector], lr=LR), vector, [g.view(-1) for g in grads])
    assert "exp_avg_sq" in state
    assert "exp_avg_res_row" not in state
    assert torch.equal(narrow.view(-1), vector)


@pytest.mark.parametrize("shape", [(100_000,), (63, 65)])
def test_deviation_3_vectors_and_small_matrices_keep_fp32_momentum(shape):
    grads = list(gradients(shape, steps=3))
    eight, full = start(shape), start(shape)
    state = run(CAME8bit([eight], lr=LR), eight, grads)
    run(CAME32bit([full], lr=LR), full, grads)
    assert state["exp_avg"].dtype == torch.float32
    assert "absmax" not in state
    assert torch.equal(eight, full)


def test_deviation_4_update_uses_momentum_before_it_is_coded():
    shape = (64, 128)
    eight, full = start(shape), start(shape)
    optimizers = CAME8bit([eight], lr=LR), CAME32bit([full], lr=LR)
    first, second = gradients(shape, steps=2)
    for optimizer, param in zip(optimizers, (eight, full), strict=True):
        run(optimizer, param, [first])
    assert torch.equal(eight, full)
    states = [o.state[p] for o, p in zip(optimizers, (eight, full), strict=True)]
    decoded = dequantize_blockwise(states[0]["exp_avg"], states[0]["absmax"])
    assert 0 < relative(decoded, states[1]["exp_avg"]) < tolerances.EIGHT_BIT_MOMENTUM
    for optimizer, param in zip(optimizers, (eight, full), strict=True):
        run(optimizer, param, [second])
    assert not torch.equal(eight, full)


def test_eight_bit_momentum_stays_close_over_many_steps():
    shape = (64, 256)
    grads = list(gradients(shape, steps=60))
    eight, full = start(shape), start(shape)
    state = run(CAME8bit([eight], lr=LR), eight, grads)
    wanted = run(CAME32bit([full], lr=LR), full, grads)["exp_avg"]
    decoded = dequantize_blockwise(state["exp_avg"], state["absmax"])
    assert relative(decoded, wanted) < tolerances.EIGHT_BIT_MOMENTUM


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("off", [0.0, 1e-3, 0.1])
def test_deviation_5_instability_around_expected_scale(noise, off):
    """Sums around kappa_0 give the definition's value, and do not cancel when updates repeat."""
    torch.manual_seed(0)
    n, k, beta1, eps2, kappa = 64, 1024, 0.9, 1e-16, 0.8
    u = torch.randn(1, n, k)
    m = (kappa * u) * (1 + noise * torch.randn(1, n, k))
    kappa_0 = torch.tensor(kappa * (1 + off * noise))
    d = u * kappa_0 - m
    delta = torch.tensor(kappa) - kappa_0
    sums = (CPU_TREE.rows(x) for x in (d * d, u * d, u * u))
    got = reference.mean_instability(*sums, delta, k, beta1, eps2)
    u64, m64, kappa64 = u.double(), m.double(), torch.tensor(kappa).double()
    m_t = beta1 * m64 + (1 - beta1) * kappa64 * u64
    wanted = ((kappa64 * u64 - m_t) ** 2 + eps2).mean(-1)
    assert ((got - wanted).abs() / wanted).max() < tolerances.INSTABILITY


def test_deviation_5_expected_scale_follows_a_spike_at_once():
    """A x1000 gradient clips hard; the prediction from this step's sums is already there."""
    shape = (64, 48)
    param = start(shape)
    optimizer = CAME32bit([param], lr=LR)
    for t, g in enumerate(gradients(shape, spikes=True, steps=40)):
        state = optimizer.state[param]
        if t > 1:
            row, col = (state[f"exp_avg_sq_{x}"].clone() for x in ("row", "col"))
            ratio = state["rms_ratio"].clone()
        run(optimizer, param, [g])
        if t > 1 and t % 17 == 5:
            g2 = (g * g).view(1, *shape)
            sums = CPU_TREE.rows(g2), CPU_TREE.columns(g2)
            row = reference.ema(row, 0.999, reference.mean_square(sums[0], shape[1], 1e-30))
            col = reference.ema(col, 0.999, reference.mean_square(sums[1], shape[0], 1e-30))
            total, mean = CPU_TREE.vector(sums[0]), CPU_TREE.vector(row) / shape[0]
            a = reference.row_factor(row, mean, 1.0)
            u = g * a.unsqueeze(-1) * reference.column_factor(col, 1.0).unsqueeze(-2)
            rms = u.square().mean().sqrt()
            ratios = (CPU_TREE.vector(x / y) for x, y in zip(sums, (row, col), strict=True))
            square = reference.predicted_square(total, *ratios, mean, 1.0).squeeze()
            expected = ratio * reference.root_mean(square, param.numel())
            assert rms > 5  # the previous step's scale would be off by this factor
            assert (expected / rms - 1).abs() < 0.05


def test_rms_ratio_is_one_where_it_means_nothing():
    for rms, predicted in ((0.0, 0.0), (1.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)):
        ratio = reference.next_rms_ratio(torch.tensor(rms), torch.tensor(predicted))
        assert ratio.item() == 1.0
    assert reference.next_rms_ratio(torch.tensor(3.0), torch.tensor(2.0)).item() == 1.5


def test_deviation_6_decay_is_not_lost_in_rounding():
    """p - p*(lr*wd), not p*(1 - lr*wd): the latter is off by 3 % at lr*wd = 1e-6."""
    p = torch.linspace(0.5, 2.0, 4096).requires_grad_()
    before = p.detach().double()
    optimizer = CAME32bit([p], lr=1e-4, weight_decay=1e-2)
    run(optimizer, p, [torch.zeros(4096)] * 1000)
    wanted = before * (1 - 1e-6) ** 1000
    shrunk = (before - p.double()).sum() / (before - wanted).sum()
    assert abs(shrunk.item() - 1) < 0.005
    factor = torch.tensor(1 - 1e-6, dtype=torch.float64).float().double()
    naive = (before - before * factor**1000).sum() / (before - wanted).sum()
    assert abs(naive.item() - 1) > 0.01


def test_deviation_7_decay_and_update_are_rounded_once():
    param = start((1000,), torch.bfloat16)
    before = param.detach().float()
    optimizer = CAME32bit([param], lr=1e-2, weight_decay=0.5, rounding="nearest")
    g = next(gradients((1000,), steps=1)).bfloat16()
    state = run(optimizer, param, [g])
    lr, shrink = reference.fp32(1e-2), reference.fp32(1e-2 * 0.5)
    wanted = (before - before * shrink) - state["exp_avg"] * lr
    assert torch.equal(param, wanted.bfloat16())


def test_stochastic_rounding_is_what_the_optimizer_applies():
    """Reproduced from the written rule: seed, position, the parameter's own step, element."""
    torch.manual_seed(0)
    first, param = start((8, 8), torch.bfloat16), start((33, 40), torch.bfloat16)
    frozen = torch.nn.Parameter(torch.zeros(3))
    before = param.detach().float()
    optimizer = CAME([{"params": [frozen]}, {"params": [first, param]}], lr=1e-3, seed=77)
    grad = torch.randn(33, 40)
    exact = before.clone().requires_grad_()
    run(CAME([exact], lr=1e-3), exact, [grad.bfloat16().float()])
    run(optimizer, param, [grad])
    bits = random_bits(param.numel(), seed=77, index=2, step=1, device=param.device)
    wanted = round_stochastic(exact.detach().view(-1), torch.bfloat16, bits)
    assert torch.equal(param.detach().view(-1), wanted)
    assert first not in optimizer.state


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *((8, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((bits, torch.float32) for bits in (4, 2, 0)),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_deviation_9_nonfinite_gradient_is_skipped(bits, dtype, bad):
    poisoned, healthy = start((64, 128), dtype), start((64, 128), dtype)
    optimizer = CAME([poisoned, healthy], lr=LR, optim_bits=bits)
    for g in gradients((64, 128), steps=3):
        poisoned.grad, healthy.grad = g.to(dtype, copy=True), g.to(dtype, copy=True)
        optimizer.step()
    before = {name: t.clone() for name, t in optimizer.state[poisoned].items()}
    param_before, healthy_before = poisoned.detach().clone(), healthy.detach().clone()
    poisoned.grad[3, 5] = bad
    optimizer.step()
    assert torch.equal(poisoned, param_before)
    assert not torch.equal(healthy, healthy_before)
    for name, value in optimizer.state[poisoned].items():
        wanted = before[name] + 1 if name == "skipped" else before[name]
        assert torch.equal(value, wanted), name
    assert optimizer.skipped_steps() == 1


def test_deviation_10_cautious_mask_does_not_underflow():
    """The published mask is (m * g > 0): that product underflows where both are tiny."""
    m, u = torch.tensor([1e-30, -1e-30, 1e-30, 0.0]), torch.tensor([1e-30, -1e-30, -1.0, 1.0])
    assert reference.agrees(m, u).tolist() == [True, True, False, False]
    assert (m * u > 0).tolist() == [False, False, False, False]


@pytest.mark.parametrize("shape", [(40,), (64, 80)])
def test_cautious_is_the_published_rule(shape):
    """phi = (m*g > 0); update * phi / clamp(mean(phi), 1e-3), on top of plain CAME."""
    grads = list(gradients(shape, steps=4))
    plain, cautious = start(shape), start(shape)
    plain_optimizer = CAME32bit([plain], lr=LR)
    optimizer = CAME32bit([cautious], lr=LR, cautious=True)
    for g in grads:
        before = plain.detach().clone()
        cautious_before = cautious.detach().clone()
        m = run(plain_optimizer, plain, [g])["exp_avg"]
        run(optimizer, cautious, [g])
        phi = m * g > 0
        wanted = (before - plain).double() * phi / max(phi.double().mean().item(), 1e-3)
        got = (cautious_before - cautious).double()
        # Both differences carry the rounding of a parameter of at most 0.1.
        assert (got - wanted).abs().max() <= 4 * 0.1 * tolerances.U + 1e-5 * wanted.abs().max()
        assert (got[~phi] == 0).all()


def test_deviation_11_row_factor_does_not_overflow():
    r = torch.tensor([[1e-32, 1e30]])
    assert reference.row_factor(r, r.mean(-1), 1.0).isfinite().all()
    assert (r.mean() / r).sqrt().isinf().any()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("shape", [(40,), (64, 80)])
def test_maximize_is_minimize_of_the_negative(shape, bits):
    grads = list(gradients(shape, steps=5))
    up, down = start(shape), start(shape)
    run(CAME([up], lr=LR, optim_bits=bits, maximize=True), up, grads)
    run(CAME([down], lr=LR, optim_bits=bits), down, [-g for g in grads])
    assert torch.equal(up, down)


@pytest.mark.parametrize("tree", [CPU_TREE, CUDA_TREE], ids=["cpu", "cuda"])
@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 3), n=st.integers(1, 300), k=st.integers(1, 3000), seed=st.integers(0, 99))
def test_sums_are_sums(tree, b, n, k, seed):
    x = torch.rand(b, n, k, generator=torch.Generator().manual_seed(seed))
    # Depth of the trees: at most 128 in a chunk, tile or stream, then its parts; positive terms.
    bound = (150 + b * n * k / 1024) * tolerances.U
    rows, wide = tree.rows(x), x.double()
    for got, wanted in (
        (rows, wide.sum(-1)),
        (tree.columns(x), wide.sum(-2)),
        (tree.total(x), wide.sum()),
        (tree.total_of_rows(rows), wide.sum()),
        (tree.vector(rows), wide.sum((-1, -2))),
        (tree.matrices(tree.vector(rows)), wide.sum()),
        (tree.flat(x.reshape(-1)), wide.sum()),
    ):
        assert got.shape == wanted.shape
        assert ((got - wanted).abs() <= bound * wanted).all()


def test_every_case_uses_the_view_it_claims():
    for shape in SHAPES:
        assert plan(shape, factored_view="last_two").factored == (len(shape) > 1)


def test_every_deviation_in_the_docs_has_its_test():
    section = (
        (ROOT / "docs" / "internals" / "algorithm.md")
        .read_text(encoding="utf-8")
        .split("## Deviations")[1]
    )
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[4])
        assert named, row
        assert set(named) <= defined, row
    documented = set(re.findall(r"`(test_\w+)`", section))
    assert {name for name in defined if name.startswith("test_deviation_")} <= documented
