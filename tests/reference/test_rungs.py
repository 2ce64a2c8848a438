"""The laws of the coarse codes, 4 and 2 bits; ``test_quant.py`` has those of 8 bits.

Checked for every bf16 value in blocks of many scales, and for random tensors of any shape.
"""

from __future__ import annotations

import math

import pytest
import torch
from code_blocks import all_bf16, fp32, in_blocks, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from came8bit.reference.rungs import COARSE_BLOCK, LARGEST_BF16, RUNGS, SMALLEST_LEVEL, Momentum

COARSE = [RUNGS[bits] for bits in (4, 2)]
SCALES = (1e-36, 1e-31, 2.0**-100, 1e-20, 3.1e-5, 1 / 3, 1.0, 1 + 2.0**-23, 1.9921875, 2 - 2.0**-23,
          12345.678, 1e37, 3.3895314e38, 3.4028235e38)  # fmt: skip


def encode(rung, m):
    return rung.encode(m, torch.zeros(m.shape, dtype=torch.bool))


def check_laws(rung, m):
    """Those that hold for every finite ``m``."""
    codes, scales = encode(rung, m)
    values = rung.decode(codes, scales, m.shape)
    assert values.shape == m.shape
    assert values.isfinite().all()
    assert same_bits(values[m == 0], torch.zeros(int((m == 0).sum())))  # +0, from either sign
    assert (values * m.sign() >= 0).all()
    again, same = encode(rung, values)
    assert torch.equal(again, codes)
    assert same_bits(same, scales)
    opposite, same = encode(rung, -m)
    assert same_bits(same, scales)
    assert torch.equal(rung.decode(opposite, same, m.shape), -values)
    return codes, scales, values


@pytest.mark.parametrize("rung", COARSE, ids=lambda rung: f"{rung.bits} bits")
@pytest.mark.parametrize("scale", SCALES)
def test_laws_over_all_bf16(rung, scale):
    m = in_blocks(all_bf16(), fp32(scale), COARSE_BLOCK)
    _, _, values = check_laws(rung, m)
    # Monotone: every block is sorted behind its first value, but for the padding of the last.
    assert (values[:-1, 1:].diff(dim=1) >= 0).all()
    largest = torch.tensor(min(scale, LARGEST_BF16)).bfloat16().float()
    if rung.bits == 4:
        assert (values[:, 0] == largest).all()  # absmax comes back as bf16 has it
    else:
        assert (values.abs() <= largest).all()


@pytest.mark.parametrize("bits", [4, 2])
def test_every_code_at_many_scales(bits):
    """Idempotent for every code and pair of scales that decoding can meet, subnormals excluded."""
    rung = RUNGS[bits]
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(0x0D80, 0x7F80, (4000,), generator=generator).to(torch.int16)
    if bits == 4:
        levels = torch.arange(-7, 8) & 15
        codes = (levels[0::2] | torch.nn.functional.pad(levels[1::2], (0, 1)) << 4).to(torch.uint8)
        m = rung.decode(codes.expand(4000, -1), high.view(torch.bfloat16)[:, None], (4000, 15))
        assert (m.diff(dim=1) > 0).all()
    else:
        low = high - torch.randint(0, 0x0800, (4000,), generator=generator).to(torch.int16)
        scales = torch.stack([low, high], dim=-1).view(torch.bfloat16)[:, None]
        codes = torch.randint(0, 256, (4000, 32), generator=generator, dtype=torch.uint8)
        m = rung.decode(codes, scales, (4000, 128))
    check_laws(rung, m)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from([(), (5,), (3, 1), (4, 127), (2, 129), (3, 7, 33), (2, 513), (0, 3),
                           (3, 0), (5, 3, 2, 2)]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    zeros=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    scale=st.sampled_from([1e-42, 1e-37, 2.0**-100, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_laws_of_random_tensors(shape, spread, zeros, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(shape, generator=generator)
    m = m * torch.exp(spread * torch.randn(shape, generator=generator)) * scale
    m = m.clamp(-1e38, 1e38) * (torch.rand(shape, generator=generator) >= zeros)
    for rung in COARSE:
        codes, scales, _ = check_laws(rung, m)
        assert codes.shape == rung.codes_shape(shape)
        assert scales.shape == rung.scales_shape(shape)


def test_four_bits_are_the_nearest_levels():
    """|q - 7 sqrt(|x| / absmax)| <= 1/2, up to rounding."""
    m = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    codes, _ = encode(RUNGS[4], m)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()
    levels = (nibbles ^ 8) - 8
    absmax = m.double().abs().unflatten(1, (-1, 128)).amax(-1, keepdim=True)
    wanted = (7 * (m.double().abs().unflatten(1, (-1, 128)) / absmax).sqrt()).flatten(1)
    assert ((levels.abs() - wanted).abs() <= 0.5 + 1e-6).all()


def test_two_bits_are_the_means_above_and_below_the_mean():
    m = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    _, scales, values = check_laws(RUNGS[2], m)
    blocks = m.double().abs().unflatten(1, (-1, 128))
    above = blocks > blocks.mean(-1, keepdim=True)
    means = [(blocks * x).sum(-1) / x.sum(-1) for x in (~above, above)]
    # bf16 rounds to 2**-9; before, magnitudes are rounded to 2**-17 of the largest.
    assert torch.allclose(scales.double(), torch.stack(means, -1), rtol=2.0**-8, atol=2.0**-15)
    assert torch.equal(values.abs().unflatten(1, (-1, 128)) == scales[..., 1:].float(), above)


def test_two_bits_with_a_zero_have_a_lower_level_of_zero():
    m = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    m[0, 5] = 0.0
    _, scales, values = check_laws(RUNGS[2], m)
    assert scales[0, 0, 0] == 0 < scales[1, 0, 0]
    assert 40 < int((values[0] == 0).sum()) < 90
    assert (values[1] != 0).all()


@pytest.mark.parametrize("rung", COARSE, ids=lambda rung: f"{rung.bits} bits")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_the_others_alone(rung, bad):
    m = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    m[1, 140] = 0.0
    codes, scales = encode(rung, m)
    clean = rung.decode(codes, scales, m.shape)
    m[1, 140] = bad
    codes, scales_with = encode(rung, m)
    values = rung.decode(codes, scales_with, m.shape)
    assert same_bits(scales_with, scales)
    assert values[1, 140].isnan() if rung.bits == 4 else values[1, 140] == 0
    values[1, 140] = 0.0
    assert torch.equal(values, clean)
    all_bad = torch.full((2, 200), bad)
    values = rung.decode(*encode(rung, all_bad), all_bad.shape)
    assert values.isnan().all() if rung.bits == 4 else not values.any()


@pytest.mark.parametrize("rung", COARSE, ids=lambda rung: f"{rung.bits} bits")
def test_blocks_and_bytes_do_not_cross_slices(rung):
    """The code of a slice is the slice of the code, so a row shard owns whole bytes and blocks."""
    m = torch.randn(5, 3, 43, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(rung, m)
    for part in (slice(0, 1), slice(1, 4), slice(4, None)):
        got_codes, got_scales = encode(rung, m[part])
        assert torch.equal(got_codes, codes[part])
        assert same_bits(got_scales, scales[part])
    spoiled = m.clone()
    spoiled[2] *= 1e30
    got_codes, got_scales = encode(rung, spoiled)
    others = [0, 1, 3, 4]
    assert torch.equal(got_codes[others], codes[others])
    assert same_bits(got_scales[others], scales[others])


@pytest.mark.parametrize("rung", COARSE, ids=lambda rung: f"{rung.bits} bits")
def test_values_without_an_update_are_stored_as_zero(rung):
    m = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    idle = torch.rand(4, 256, generator=torch.Generator().manual_seed(1)) < 0.3
    codes, scales = rung.encode(m, idle)
    values = rung.decode(codes, scales, m.shape)
    assert not values[idle].any()
    wanted, wanted_scales = encode(rung, torch.where(idle, 0.0, m))
    assert torch.equal(codes, wanted)
    assert same_bits(scales, wanted_scales)


def test_tiny_blocks_of_two_bits_store_zeros():
    for scale in (SMALLEST_LEVEL / 4, 2.0**-126, 2.0**-140):
        codes, scales = encode(RUNGS[2], torch.full((1, 128), scale))
        assert not codes.any()
        assert not scales.any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_momentum_knows_its_rung_and_decays_by_its_scales(bits):
    shape = (4, 3, 100)
    rung = RUNGS[bits]
    codes = torch.zeros(rung.codes_shape(shape), dtype=rung.code_dtype)
    scales = torch.zeros(rung.scales_shape(shape), dtype=rung.scale_dtype)
    held = Momentum(codes, scales, shape)
    assert held.rung is rung
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coded, remembered = held.encode(m, torch.zeros(shape, dtype=torch.bool))
    held.store(coded)
    assert (remembered is None) == (bits == 8)
    if remembered is not None:
        assert torch.equal(remembered, held.load())
    assert torch.allclose(held.decayed(0.5), held.load() * 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.007), (4, 0.1225), (2, 0.35)])
def test_error_of_one_coding(bits, error):
    """Relative RMS error of Gaussian values."""
    m = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    values = RUNGS[bits].decode(*encode(RUNGS[bits], m), m.shape)
    assert ((values - m).norm() / m.norm()).item() == pytest.approx(error, rel=0.03)
