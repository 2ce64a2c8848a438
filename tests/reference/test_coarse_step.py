"""Steps with 4, 2 and 0 bits: what the code does not remember acts at once, and nothing is lost."""

from __future__ import annotations

import copy

import pytest
import tolerances
import torch
from paths import ROOT
from training import gradients, run, same_bits, start

import came8bit
from benchmarks import update_size
from benchmarks.state_bytes import llama_7b
from came8bit import CAME
from came8bit.reference.rungs import Momentum
from came8bit.state.layout import state_bytes

LR = 1e-3
BITS = [4, 2, 0]

pytestmark = pytest.mark.filterwarnings(
    "ignore:came8bit's compiled CPU kernels do not have optim_bits=2"
)


def decoded(state, shape):
    return Momentum(state["exp_avg"], state["scales"], shape).load()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("correct", [False, True])
def test_a_step_is_what_it_says(bits, nesterov, correct):
    """Each of twenty steps against float64, from the state that it started with."""
    shape, betas = (48, 200), (0.9, 0.999, 0.9999)
    param = start(shape)
    options = {"bias_correction": correct, "nesterov": nesterov, "min_8bit_size": 0}
    optimizer = CAME([param], lr=LR, optim_bits=bits, betas=betas, **options)
    m = torch.zeros(shape).double()
    r = big_r = torch.zeros(48).double()
    c = big_c = torch.zeros(200).double()
    for t, g in enumerate(gradients(shape, steps=20), 1):
        before, g = param.detach().double(), g.double()
        state = run(optimizer, param, [g.float()])
        c1, c2, c3 = (
            1 - beta**s if correct else 1.0
            for beta, s in zip(betas, (t + 1 if nesterov else t, t, t), strict=True)
        )
        r = betas[1] * r + (1 - betas[1]) * (g * g).mean(1)
        c = betas[1] * c + (1 - betas[1]) * (g * g).mean(0)
        u = g * (r.mean() / r).sqrt()[:, None] / (c / c2).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = betas[0] * m + (1 - betas[0]) * u
        s = (u - m) ** 2 + 1e-16
        big_r = betas[2] * big_r + (1 - betas[2]) * s.mean(1)
        big_c = betas[2] * big_c + (1 - betas[2]) * s.mean(0)
        confidence = (big_r.mean() / big_r).sqrt()[:, None] / (big_c / c3).sqrt()
        remembered = decoded(state, shape).double()
        direction = betas[0] * m + (1 - betas[0]) * u if nesterov else m
        rest = betas[0] ** (2 if nesterov else 1) / (1 - betas[0])
        wanted = LR * confidence * (direction / c1 + rest * (m - remembered))
        moved = before - param.double()
        rounding = tolerances.U * before.norm()
        assert (moved - wanted).norm() <= 1e-5 * wanted.norm() + 2 * rounding
        assert 0.01 < ((m - remembered).norm() / m.norm()).item() < 0.6 or not bits
        m = remembered


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_every_gradient_has_its_whole_effect(bits, nesterov):
    """Without confidence term, and when all momentum is spent, every rung has moved by the same."""
    shape, idle = (128, 2), [torch.zeros(128, 2)] * 140
    moved = {}
    for rung in (32, bits):
        param = torch.zeros(shape, requires_grad=True)
        optimizer = CAME([param], lr=LR, optim_bits=rung, nesterov=nesterov, min_8bit_size=0)
        state = run(optimizer, param, [*gradients(shape, steps=20), *idle])
        assert "exp_avg_sq" in state
        moved[rung] = param.detach().clone()
    assert (moved[bits] - moved[32]).norm() < 1e-5 * moved[32].norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_columns_that_never_had_a_gradient_do_not_move(bits, nesterov):
    """Their confidence is 1e8: the least momentum that a code made up would throw them away."""
    shape = (16, 256)
    param = torch.zeros(shape, requires_grad=True)
    optimizer = CAME([param], lr=LR, optim_bits=bits, nesterov=nesterov, bias_correction=True)
    for g in gradients(shape, steps=60):
        g[:, 40:60] = 0
        run(optimizer, param, [g])
    assert not param[:, 40:60].any()
    assert param[:, :40].abs().min() > 0


@pytest.mark.parametrize("bits", BITS)
def test_cautious_masks_what_is_spent_as_well(bits):
    shape = (32, 128)
    plain, cautious = start(shape), start(shape)
    g = next(gradients(shape, steps=1))
    options = {"lr": LR, "optim_bits": bits}
    for param, mask in ((plain, False), (cautious, True)):
        optimizer = CAME([param], cautious=mask, **options)
        run(optimizer, param, [g])  # the first momentum agrees with its gradient everywhere
    assert torch.equal(plain, cautious)
    optimizer = CAME([cautious], cautious=True, **options)
    before = cautious.detach().clone()
    run(optimizer, cautious, [g, torch.zeros(shape)])
    once = start(shape)
    with torch.no_grad():
        once.copy_(before)
    run(CAME([once], cautious=True, **options), once, [g])
    assert torch.equal(cautious, once)  # no gradient, so no element agrees with it


@pytest.mark.parametrize(("bits", "nesterov"), [(8, True), *((bits, False) for bits in BITS)])
def test_resuming_paging_and_backward_steps_have_the_same_bits(bits, nesterov, tmp_path):
    """After a state dict, a deep copy and a pickle; on pages; and in backward."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 130), torch.nn.Linear(130, 70)).bfloat16()
    models = [copy.deepcopy(model) for _ in range(5)]
    options = {"lr": LR, "optim_bits": bits, "min_8bit_size": 0, "bias_correction": True}
    options["nesterov"] = nesterov
    optimizers = [CAME(m.parameters(), is_paged=i == 1, **options) for i, m in enumerate(models)]
    came8bit.step_in_backward(optimizers[2])
    for t in range(6):
        x = torch.randn(16, 70, generator=torch.Generator().manual_seed(t)).bfloat16()
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        if t == 2:
            optimizers[3].load_state_dict(copy.deepcopy(optimizers[3].state_dict()))
            fresh = CAME(models[4].parameters(), is_paged=True, **options)
            torch.save(optimizers[4].state_dict(), tmp_path / "state.pt")
            fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
            models[4], optimizers[4] = copy.deepcopy((models[4], fresh))
    for m in models[1:]:
        for got, wanted in zip(m.parameters(), models[0].parameters(), strict=True):
            assert same_bits(got, wanted)


def test_named_classes_are_their_rungs():
    for bits in (8, 4, 2):
        for paged in ("", "Paged"):
            cls = getattr(came8bit, f"{paged}CAME{bits}bit")
            assert getattr(came8bit, f"{paged}CAME{bits}") is cls
            optimizer = cls([torch.nn.Parameter(torch.zeros(3))])
            assert optimizer.param_groups[0]["optim_bits"] == bits
            assert issubclass(cls, CAME)
    assert "optim_bits" not in " ".join(came8bit.kernel_status().reference_only)


@pytest.mark.parametrize(("bits", "most"), [(8, 1.02), (4, 0.55), (2, 0.30), (0, 0.005)])
def test_bytes_of_a_7b_llama(bits, most):
    numel = sum(torch.Size(shape).numel() for shape in llama_7b())
    assert state_bytes(llama_7b(), optim_bits=bits) / numel <= most


@pytest.mark.parametrize(("bits", "near"), [(4, tolerances.DEAD_COLUMNS), (2, 0.15)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_columns_that_stop_stay_where_they_are(bits, near, nesterov):
    """As ``test_decay_reaches_zero``, whose 20,000 steps follow from these few hundred.

    The first step without a gradient spends what is left and stores 0, from which a column without
    updates cannot move again. Until then they have moved about as far as with fp32. (2 bits act
    earlier, while the confidence still falls.)
    """
    shape, dead = (16, 256), slice(0, 64)
    pool = list(gradients(shape, steps=64))
    travelled = {}
    for rung in (32, bits):
        param = torch.zeros(shape, requires_grad=True)
        options = {"lr": 1.0, "min_8bit_size": 0, "nesterov": nesterov}
        optimizer = CAME([param], optim_bits=rung, **options)
        for t in range(250):
            g = pool[t % 64].clone()
            if t >= 50:
                g[:, dead] = 0
            before = param.detach()[:, dead].clone()
            state = run(optimizer, param, [g])
            if rung != 32 and t > 50:
                assert torch.equal(param[:, dead], before)
                assert not decoded(state, shape)[:, dead].any()
        travelled[rung] = param.detach()[:, dead].norm().item()
    assert travelled[bits] == pytest.approx(travelled[32], rel=near)


def test_size_of_updates_is_what_the_docs_say():
    """RMS over lr for pure noise, at the steps of the table that are cheap to reach."""
    table = {
        "AdamW": (1.0, 0.33, 0.23),
        "CAME as published": (11, 7.5, 2.5),
        "bias correction": (1.1, 0.37, 0.25),
        "bias correction, Nesterov": (1.1, 0.41, 0.29),
        "the same, 8 bits": (1.1, 0.41, 0.29),
        "the same, 4 bits": (1.1, 0.48, 0.38),
        "the same, 2 bits": (1.2, 0.74, 0.67),
        "the same, 0 bits": (2, 1.2, 1.1),
        "bias correction, 2 bits": (1.3, 0.74, 0.68),
    }
    rules = update_size.rules()
    assert set(rules) == set(table)
    page = (ROOT / "docs" / "internals" / "algorithm.md").read_text(encoding="utf-8")
    for name, wanted in table.items():
        got = update_size.sizes(rules[name], (1, 10, 100)).values()
        assert list(got) == pytest.approx(wanted, rel=0.05), name
        assert f"| {name} | " + " | ".join(f"{size:.2g}" for size in wanted) + " |" in page
