"""Decay in the 8-bit code (law 11 of ``test_quant.py``)."""

from __future__ import annotations

import pytest
import torch
from code_blocks import LEVEL_ERROR, SCALES, all_levels, fp32
from problems import make_problem, random_grad

from came8bit.reference import quant
from came8bit.reference.quant import CODE_MAPS, dequantize_blockwise, quantize_blockwise


@pytest.mark.parametrize("code", sorted(CODE_MAPS))
@pytest.mark.parametrize("scale", [s for s in SCALES if s >= 2.0**-112])
def test_a_value_that_has_not_changed_keeps_its_code_when_it_decays(code, scale):
    """Rounding toward zero must not mistake a rounding error for a change.

    Below 2**-112 the smallest levels are subnormal numbers, whose own rounding may cost a level.
    """
    codes, absmax = all_levels(fp32(scale).view(1))
    values = dequantize_blockwise(codes, absmax, code=code)
    decaying = torch.ones_like(codes, dtype=torch.bool)
    again, same = quantize_blockwise(values, decaying=decaying, code=code)
    assert torch.equal(again, codes)
    assert torch.equal(same, absmax)


def test_an_unchanged_value_keeps_its_code_at_random_scales():
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randint(0x07800000, 0x7F800000, (3000,), generator=generator)
    codes, absmax = all_levels(patterns.to(torch.int32).view(torch.float32))
    values = dequantize_blockwise(codes, absmax)
    again, _ = quantize_blockwise(values, decaying=torch.ones_like(values, dtype=torch.bool))
    assert torch.equal(again, codes)


def decayed(codes, absmax, beta1):
    """``beta1*m`` as the rule forms it: the scale is multiplied, not every value."""
    return dequantize_blockwise(codes, absmax * torch.tensor(beta1))


@pytest.mark.parametrize("beta1", [0.9, 0.99, 0.999])
def test_a_decaying_value_in_a_live_block_loses_a_level_every_step(beta1):
    """The first value keeps absmax where it is, the others (every level) only decay."""
    codes = torch.arange(-127, 128, dtype=torch.int8).view(1, -1)
    absmax = torch.full((1, 1), 0.37)
    live = torch.zeros(1, 255, dtype=torch.bool)
    live[0, 0] = True
    for _ in range(127):
        m = torch.where(live, -0.37, decayed(codes, absmax, beta1))
        after, absmax = quantize_blockwise(m, decaying=~live)
        moving = (codes != 0) & ~live
        assert (after.int().abs() < codes.int().abs())[moving].all()
        assert (after.sign() * codes.sign() >= 0).all()
        assert absmax.item() == fp32(0.37).item()
        codes = after
    assert not codes[~live].any()


def test_how_slowly_a_value_may_decay():
    """The small bias holds level 1 where beta1 is at least (1 - 2**-14)**2 = 0.99988."""
    codes, absmax = torch.tensor([[127, 1]], dtype=torch.int8), torch.ones(1, 1)
    decaying = torch.tensor([[False, True]])
    for beta1, level in ((0.9998, 0), (0.9999, 1)):
        m = decayed(codes, absmax, beta1)
        m[0, 0] = 1.0
        after, _ = quantize_blockwise(m, decaying=decaying)
        assert after.tolist() == [[127, level]]


def test_nearest_rounding_would_leave_fixed_points():
    """What the rule is there for: without it, levels up to 9 never decay at beta1 = 0.9."""
    codes = torch.arange(128, dtype=torch.int8).view(1, -1)
    absmax = torch.ones(1, 1)
    for _ in range(500):
        m = decayed(codes, absmax, 0.9)
        m[0, -1] = 1.0
        codes, absmax = quantize_blockwise(m)
    assert sorted(set(codes[0, :-1].tolist())) == list(range(10))


@pytest.mark.parametrize("beta1", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("factored", [True, False])
def test_a_block_that_only_decays_keeps_its_codes_and_fades(isa, beta1, factored):
    """In the kernels: rows whose gradient stops; beside them a row in which half of it stops."""
    generator = torch.Generator().manual_seed(3)
    shape = (6, 600)
    problem = make_problem(shape, factored=factored, generator=generator)
    for _ in range(3):
        problem.run_op(random_grad(shape, torch.float32, generator), beta1=beta1)
    dead = torch.zeros(shape, dtype=torch.bool)
    dead[:3] = True
    dead[3, ::2] = True
    expected = problem.copy()
    codes, absmax = (problem.state[name].clone() for name in ("exp_avg", "absmax"))
    for step in range(130):
        grad = random_grad(shape, torch.float32, generator) * ~dead
        problem.run_op(grad, beta1=beta1)
        got, scales = problem.state["exp_avg"], problem.state["absmax"]
        absmax = absmax * torch.tensor(beta1)
        assert torch.equal(got[:3], codes[:3])
        assert torch.equal(scales[:3], absmax[:3])
        if step < 5:
            expected.run_reference(grad, beta1=beta1)
            assert torch.equal(got, expected.state["exp_avg"])
            assert torch.equal(scales, expected.state["absmax"])
    assert codes[3][dead[3]].any()
    if beta1 == 0.9:
        assert not got[3][dead[3]].any()


def test_decaying_rounds_toward_zero_and_no_further():
    """The code of a decaying value is the largest level not above it, zero and absmax included."""
    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.exp(torch.randn(64, 256))
    decaying = torch.rand(64, 256) < 0.5
    codes, absmax = quantize_blockwise(x, decaying=decaying)
    level = 127 * (x.double().abs() / absmax.double()).sqrt()
    below = level.floor()
    near_next = level - below > 1 - quant.DECAY_BIAS - LEVEL_ERROR
    got = codes.double().abs()
    assert torch.equal(got[decaying & ~near_next], below[decaying & ~near_next])
    nearest, _ = quantize_blockwise(x)
    assert torch.equal(codes[~decaying], nearest[~decaying])
    assert (codes[x.abs() == absmax].abs() == 127).all()
