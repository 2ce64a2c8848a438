"""The laws of the 8-bit code.

``came8bit/quant.py`` is the specification, ``csrc/quant.h`` the kernels' version of it. Laws 1
to 6 are checked for every one of the 65,536 bf16 patterns, in blocks of many scales, and for random
fp32 tensors beyond; law 10 says that the kernels have the same bits, so the others hold for them.

 1. 0 <-> 0: zeros of either sign get code 0, and code 0 is +0.
 2. +-absmax <-> +-127, exactly.
 3. Odd: encode(-x) == -encode(x), decode(-code) == -decode(code).
 4. Monotone, both ways.
 5. Idempotent: encode(decode(code)) == code.
 6. The code is the nearest level in the companded domain; the value errs by at most half a level.
 7. An all-zero block, and one whose absmax is below 2**-126, stores zeros.
 8. A value that is not finite becomes -128, decodes to NaN, and changes nothing else.
 9. A block never crosses a slice of the first dimension.
10. Kernels and reference have the same bits, with every instruction set of this processor.
11. A value that only decays loses a level at every step, hence reaches 0; a block that only decays
    keeps its codes.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import make_problem, random_grad

import came8bit
from came8bit.ops import libraries
from came8bit.reference import quant
from came8bit.reference.quant import (
    BLOCK_SIZE,
    CODE_MAPS,
    NAN_CODE,
    SMALLEST_ABSMAX,
    absmax_shape,
    blocks_per_slice,
    dequantize_blockwise,
    quantize_blockwise,
    slice_shape,
)

U = 2.0**-24  # unit roundoff of fp32
ISAS = libraries.supported_cpu_isas()

# A level is sqrt(16129*y). The two roundings of x * (16129/absmax) shift it by at most 127 * U. The
# comparison with (q + 1/2)**2 is exact: that is a multiple of 1/4 below 2**14. The factor covers
# second-order terms.
LEVEL_ERROR = 127 * U * 1.01

# The middle of levels q and q+1 is (q*q + q + 1/2)/16129 by value and (q*q + q + 1/4)/16129 in the
# companded domain. Between the two, the code is not the nearest by value, and is the farther one by
# up to twice that distance.
EXCESS_IN_VALUE = 1 / (2 * 127**2)

# Relative to absmax: four roundings in a decoded value (1/127, t, t*t, the product) and the shift
# of a boundary (2U), counted twice because both candidates move.
VALUE_ROUNDING = 12 * U

SCALES = (
    SMALLEST_ABSMAX,
    SMALLEST_ABSMAX * (1 + 2.0**-23),
    1e-30,
    2.0**-20,
    3.1e-5,
    1 / 3,
    1.0,
    1 + 2.0**-23,
    2 - 2.0**-23,
    1.9921875,
    12345.678,
    2.0**-100 * (1 - 2.0**-24),  # below 2**-100 the block is scaled by a power of two first
    2.0**-100,
    2.0**127 * (1 + 2.0**-23),
    3.3895314e38,  # the largest bf16
    3.4028235e38,  # the largest fp32
)


def fp32(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64).to(torch.float32)


def all_bf16() -> torch.Tensor:
    """Every bf16 pattern as fp32, shape (65536,)."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return patterns.view(torch.bfloat16).to(torch.float32)


def in_blocks(values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Those of ``values`` that fit, sorted, in blocks of 256 that begin with ``absmax``."""
    values = values[values.abs() <= absmax].sort().values
    values = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK_SIZE - 1)))
    values = values.view(-1, BLOCK_SIZE - 1)
    return torch.cat([absmax.expand(len(values), 1), values], dim=1)


def all_levels(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code in one block, for each of the scales: int8 ``(n, 255)``, fp32 ``(n, 1)``."""
    codes = torch.arange(-127, 128, dtype=torch.int8).expand(len(absmax), 255).contiguous()
    return codes, absmax.view(-1, 1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, the sign of 0 and of NaN included."""
    as_int = {torch.float32: torch.int32}.get(a.dtype, a.dtype)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(as_int), b.view(as_int))


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test with every instruction set of this processor."""
    before = libraries.cpu_isa()
    libraries.set_cpu_isa(request.param)
    yield request.param
    libraries.set_cpu_isa(before)


def test_the_kernels_under_test_are_there():
    """Without the compiled library the tests of law 10 would have nothing to run on."""
    assert ISAS or not libraries.status().cpu.loaded
    assert ISAS[:1] == ["baseline"][: len(ISAS)]


# --- laws 1 to 6, exhaustively --------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CODE_MAPS))
@pytest.mark.parametrize("scale", SCALES)
def test_laws_over_all_bf16(code, scale):
    absmax = fp32(scale)
    x = in_blocks(all_bf16(), absmax)
    codes, scales = quantize_blockwise(x, code=code)
    values = dequantize_blockwise(codes, scales, code=code)

    # 1: zeros of both signs are among the values, and only +0 comes back.
    assert (x == 0).any()
    assert (codes[x == 0] == 0).all()
    assert same_bits(values[codes == 0], torch.zeros(int((codes == 0).sum())))
    # 2
    assert (scales == absmax).all()
    assert (codes[x == absmax] == 127).all()
    assert (values[codes == 127] == absmax).all()
    assert (values[codes == -127] == -absmax).all()
    # 3
    negative, _ = quantize_blockwise(-x, code=code)
    assert torch.equal(negative, -codes)
    assert torch.equal(dequantize_blockwise(-codes, scales, code=code), -values)
    # 4: the values are sorted, and padded with zeros at the end.
    order = x[:, 1:].flatten()[: int((all_bf16().abs() <= absmax).sum())]
    ascending = codes[:, 1:].flatten()[: len(order)].int()
    assert (ascending.diff() >= 0).all()
    # 5
    again, same_scales = quantize_blockwise(values, code=code)
    assert torch.equal(again, codes)
    assert torch.equal(same_scales, scales)


@pytest.mark.parametrize("code", sorted(CODE_MAPS))
def test_every_code_at_many_scales(code):
    """2, 4, 5 for all 255 codes: 2,000 scales over all normal numbers, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0x00800000, 0x7F800000, (2000,), generator=generator)
    absmax = torch.cat([patterns.to(torch.int32).view(torch.float32), fp32(SCALES)])
    codes, scales = all_levels(absmax)
    values = dequantize_blockwise(codes, scales, code=code)
    assert (values.diff(dim=1) > 0).all()
    assert torch.equal(values[:, -1:], scales)
    again, same_scales = quantize_blockwise(values, code=code)
    assert torch.equal(again, codes)
    assert torch.equal(same_scales, scales)


@pytest.mark.parametrize("scale", SCALES)
def test_code_is_the_nearest_level_in_the_companded_domain(scale):
    """6, against brute force in float64: all distances to all levels, for every bf16."""
    x = in_blocks(all_bf16(), fp32(scale))
    codes, absmax = quantize_blockwise(x)
    check_against_brute_force(x, codes, absmax)


def check_against_brute_force(x, codes, absmax):
    """The code is an argmin of |127 sqrt(y) - level|, or as good up to rounding errors of y."""
    scale = absmax.double().repeat_interleave(BLOCK_SIZE, dim=1)[:, : x.shape[1]]
    x, codes = x.double(), codes.double()
    assert (codes * x >= 0).all()
    y = x.abs() / scale
    level = 127 * y.sqrt()
    best = brute_force(level.flatten(), torch.arange(128, dtype=torch.float64)).view(x.shape)
    excess = (codes.abs() - level).abs() - (best - level).abs()
    assert (excess <= 2 * LEVEL_ERROR).all()

    # By value: at most EXCESS_IN_VALUE of absmax worse than the nearest of all values.
    table = torch.arange(128, dtype=torch.float64).square() / 127**2
    nearest = brute_force(y.flatten(), table).view(x.shape)
    error = (codes.abs().square() / 127**2 - y).abs()
    assert (error - (nearest - y).abs() <= EXCESS_IN_VALUE + VALUE_ROUNDING).all()
    # Half a level, seen by value: |a - b| = |sqrt a - sqrt b| * (sqrt a + sqrt b).
    assert (error <= (2 * y.sqrt() + 1 / 254) / 254 + VALUE_ROUNDING).all()


def brute_force(x, table):
    """The entry of ``table`` nearest to each of ``x``, by looking at all of them."""
    chunks = [table[(part.unsqueeze(-1) - table).abs().argmin(-1)] for part in x.split(8192)]
    return torch.cat(chunks)


@pytest.mark.skipif(sys.platform == "darwin", reason="bitsandbytes has no build for macOS")
@pytest.mark.parametrize("distribution", ["gaussian", "heavy tail", "sparse"])
def test_against_bitsandbytes_with_our_table(distribution):
    """bitsandbytes picks the nearest value of a table: ours, which it searches in its own way.

    So its code may be one level nearer to zero, its scales are ours, and its error is smaller by
    no more than the derived bound.
    """
    from bitsandbytes import functional

    torch.manual_seed(0)
    x = torch.randn(512, 256)
    if distribution == "heavy tail":
        x = x * torch.exp(1.5 * torch.randn_like(x))
    elif distribution == "sparse":
        x = x * (torch.rand_like(x) < 0.1)
    codes, absmax = quantize_blockwise(x)
    values = dequantize_blockwise(codes, absmax)

    levels, scale = all_levels(torch.ones(1))
    table = dequantize_blockwise(levels, scale).flatten()
    table = torch.cat([table, table[-1:]])  # it wants 256 entries: the last one twice
    theirs, state = functional.quantize_blockwise(x, code=table, blocksize=256)
    their_values = functional.dequantize_blockwise(theirs, state)
    their_level = (theirs.int() - 127).clamp(max=127)

    assert torch.equal(state.absmax, absmax.flatten())
    nearer_to_zero = (codes.int() - their_level) * codes.int().sign()
    assert set(nearer_to_zero.unique().tolist()) <= {0, 1}
    assert (nearer_to_zero == 0).double().mean() > 0.95
    assert (their_level[x == 0] == 0).all()
    excess = ((values - x).abs() - (their_values - x).abs()).double() / absmax
    assert excess.max() <= EXCESS_IN_VALUE + VALUE_ROUNDING


# --- laws 7 to 9 ----------------------------------------------------------------------------------


#: The reference and the operators, which are the kernels where those are compiled.
ENCODERS = [
    pytest.param(quantize_blockwise, dequantize_blockwise, id="reference"),
    pytest.param(came8bit.quantize_blockwise, came8bit.dequantize_blockwise, id="operator"),
]


@pytest.mark.parametrize("code", sorted(CODE_MAPS))
def test_blocks_of_zeros_and_tiny_blocks_store_zeros(code):
    below = torch.tensor(SMALLEST_ABSMAX).nextafter(torch.tensor(0.0))
    assert 0 < below < SMALLEST_ABSMAX
    tiny = all_bf16()
    tiny = tiny[tiny.abs() < SMALLEST_ABSMAX]  # zeros and subnormal numbers
    rows = [torch.zeros(256), -torch.zeros(256), below.repeat(256), *tiny.split(256)]
    for row in rows:
        codes, absmax = quantize_blockwise(row.view(1, -1), code=code)
        assert same_bits(absmax, torch.zeros(1, 1))
        assert not codes.any()
        values = dequantize_blockwise(codes, absmax, code=code)
        assert same_bits(values, torch.zeros(1, len(row)))
    smallest = torch.full((1, 256), SMALLEST_ABSMAX)
    codes, absmax = quantize_blockwise(smallest, code=code)
    assert (codes == 127).all()
    assert absmax.item() == SMALLEST_ABSMAX


@pytest.mark.parametrize(("encode", "decode"), ENCODERS)
def test_each_nonfinite_value_is_marked_and_leaves_its_neighbours_alone(encode, decode):
    """All 256 bf16 patterns that are not finite, one to a block, at changing places."""
    bad = all_bf16()
    bad = bad[~bad.isfinite()]
    torch.manual_seed(0)
    x = torch.randn(len(bad), 300)
    place = (torch.arange(len(bad)), torch.arange(len(bad)) % 256)
    x[place] = 0.0
    codes, absmax = encode(x)
    x[place] = bad
    got_codes, got_absmax = encode(x)
    codes[place] = NAN_CODE
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_absmax, absmax)
    values = decode(got_codes, got_absmax)
    assert values[place].isnan().all()
    values[place] = 0.0
    assert values.isfinite().all()


@pytest.mark.parametrize(("encode", "decode"), ENCODERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_without_finite_values(encode, decode, bad):
    codes, absmax = encode(torch.full((2, 300), bad))
    assert (codes == NAN_CODE).all()
    assert not absmax.any()
    assert decode(codes, absmax).isnan().all()


@pytest.mark.parametrize(("encode", "decode"), ENCODERS)
@pytest.mark.parametrize("shape", [(5, 255), (5, 257), (5, 4097), (4, 3, 5, 5), (3, 1), (7, 8, 33)])
def test_blocks_do_not_cross_slices(encode, decode, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    codes, absmax = encode(x)
    assert absmax.shape == absmax_shape(shape)
    for outlier in (1e30, math.inf):
        spoiled = x.clone()
        spoiled[1].view(-1)[-1] = outlier
        spoiled[2].view(-1)[0] = outlier
        got_codes, got_absmax = encode(spoiled)
        others = [i for i in range(shape[0]) if i not in (1, 2)]
        assert torch.equal(got_codes[others], codes[others])
        assert torch.equal(got_absmax[others], absmax[others])
        assert not torch.equal(got_codes[1], codes[1])
    # Hence the code of a slice is the slice of the code: a row shard owns whole blocks.
    for part in (slice(0, 1), slice(1, shape[0]), slice(shape[0], None)):
        part_codes, part_absmax = encode(x[part])
        assert torch.equal(part_codes, codes[part])
        assert torch.equal(part_absmax.flatten(), absmax[part].flatten())
        assert torch.equal(decode(part_codes, part_absmax), decode(codes, absmax)[part])


# --- law 10, and the others for random tensors ----------------------------------------------------

SIZES = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 64, 65, 255, 256, 257, 511, 513])

LAYOUTS = ["contiguous", "transposed", "every second", "slice", "expanded"]


@st.composite
def tensors(draw) -> torch.Tensor:
    """fp32 tensors of rank 0 to 4, odd sizes, any strides, values over many magnitudes."""
    long = st.sampled_from([4095, 4096, 4097])
    shapes = st.one_of(
        st.just(()),
        st.tuples(st.one_of(SIZES, long)),
        st.tuples(st.integers(0, 5), st.one_of(SIZES, long)),
        st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 33)),
        st.tuples(*[st.integers(1, 5)] * 4),
    )
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(
        st.sampled_from(["contiguous", "transposed", "every second", "slice", "expanded"])
    )
    if layout == "transposed":
        x = torch.randn(shape[::-1], generator=generator).permute(tuple(range(len(shape)))[::-1])
    elif layout == "every second" and shape:
        x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    elif layout == "slice" and shape:
        x = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator)[..., 1 : shape[-1] + 1]
    elif layout == "expanded" and shape:
        x = torch.randn(1, *shape[1:], generator=generator).expand(shape)
    else:
        x = torch.randn(shape, generator=generator)
    spread = draw(st.sampled_from([0.0, 1.0, 10.0]))
    if spread and x.numel():
        x = (
            x.mul(torch.exp(torch.randn(shape, generator=generator) * spread))
            if (layout == "contiguous")
            else x * spread
        )
    zeros = draw(st.sampled_from([0.0, 0.5, 1.0]))
    if zeros and layout == "contiguous":
        x = x * (torch.rand(shape, generator=generator) >= zeros)
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-38, 1e-42, 1e30]))
    factor = torch.tensor(scale)
    x = x.mul_(factor) if layout in ("transposed", "every second", "slice") else x * factor
    assert x.shape == torch.Size(shape)
    return x


@settings(max_examples=150, deadline=None)
@given(x=tensors())
@example(x=torch.tensor(3.0))
@example(x=torch.tensor(-0.0))
@example(x=torch.empty(0))
@example(x=torch.empty(0, 5))
@example(x=torch.empty(5, 0))
@example(x=torch.tensor([math.inf, -math.inf, math.nan, 1.0, -2.0]))
def test_laws_of_random_tensors(x):
    codes, absmax = quantize_blockwise(x)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert codes.is_contiguous()
    assert absmax.dtype == torch.float32
    assert absmax.shape == absmax_shape(x.shape)
    values = dequantize_blockwise(codes, absmax)
    assert values.shape == x.shape
    finite = x.isfinite()
    assert torch.equal(codes == NAN_CODE, ~finite)
    assert torch.equal(values.isnan(), ~finite)
    slices, slice_len = slice_shape(x.shape)
    assert absmax.numel() == slices * blocks_per_slice(slice_len)

    flat = torch.where(finite, x, 0.0).reshape(slices, slice_len)
    for i, (row, row_codes) in enumerate(zip(flat, codes.view(slices, slice_len), strict=True)):
        parts = zip(row.split(BLOCK_SIZE), row_codes.split(BLOCK_SIZE), strict=True)
        for j, (block, levels) in enumerate(parts):
            if not len(block):
                continue
            largest = block.abs().max()
            live = largest >= SMALLEST_ABSMAX
            assert absmax[i, j] == (largest if live else 0.0)
            levels = torch.where(levels == NAN_CODE, 0, levels)
            assert (levels.int()[block.argsort()].diff() >= 0).all() or not live
            assert (levels[block == 0] == 0).all()
            assert (
                ((levels.abs() == 127).any() and (levels.sign() * block >= 0).all())
                if live
                else True
            )
            if live:
                check_against_brute_force(block[None], levels[None], absmax[i : i + 1, j : j + 1])
    again, same_absmax = quantize_blockwise(values)
    assert torch.equal(again, codes)
    assert torch.equal(same_absmax, absmax)


def assert_kernel_is_reference(x):
    codes, absmax = quantize_blockwise(x)
    got_codes, got_absmax = came8bit.quantize_blockwise(x)
    assert torch.equal(got_codes, codes)
    assert same_bits(got_absmax, absmax)
    values = dequantize_blockwise(codes, absmax)
    got = came8bit.dequantize_blockwise(got_codes, got_absmax)
    nan = values.isnan()
    assert torch.equal(got.isnan(), nan)
    assert same_bits(torch.where(nan, 0.0, got), torch.where(nan, 0.0, values))


@pytest.mark.parametrize("scale", SCALES)
def test_kernel_is_the_reference_over_all_bf16(isa, scale):
    values = all_bf16()
    assert_kernel_is_reference(in_blocks(values, fp32(scale)))
    assert_kernel_is_reference(values.view(-1, 256))


def test_kernel_is_the_reference_for_every_code_and_scale(isa):
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(0, 0x7F800000, (2000,), generator=generator)
    codes, absmax = all_levels(patterns.to(torch.int32).view(torch.float32))
    values = dequantize_blockwise(codes, absmax)
    assert same_bits(came8bit.dequantize_blockwise(codes, absmax), values)
    assert_kernel_is_reference(values)
    # The two fp32 numbers on either side of every boundary between codes, as they come.
    edge = (torch.arange(127, dtype=torch.float64) + 0.5).square() / 127**2
    edges = (edge * absmax.double()).to(torch.float32)
    up = torch.nextafter(edges, torch.tensor(math.inf))
    down = torch.nextafter(edges, torch.tensor(0.0))
    edges = torch.stack([edges, up, down], dim=1).view(-1, 127)
    assert_kernel_is_reference(torch.cat([absmax.repeat_interleave(3, 0), edges], dim=1))


@settings(max_examples=120, deadline=None)
@given(x=tensors())
@example(x=torch.tensor(3.0))
@example(x=torch.empty(0))
@example(x=torch.empty(0, 5))
@example(x=torch.empty(5, 0))
@example(x=torch.tensor([[math.inf, -math.inf, math.nan, 1.0, -2.0] * 60]))
@example(x=torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last))
def test_kernel_is_the_reference_for_random_tensors(x):
    before = libraries.cpu_isa() if ISAS else None
    for name in ISAS:
        libraries.set_cpu_isa(name)
        assert_kernel_is_reference(x)
    if before:
        libraries.set_cpu_isa(before)


def test_layout_of_slices_and_blocks():
    cases = {
        (): ((1, 1), 1),
        (0,): ((1, 0), 0),
        (255,): ((1, 255), 1),
        (256,): ((1, 256), 1),
        (257,): ((1, 257), 2),
        (4097, 1): ((4097, 1), 1),
        (3, 4097): ((3, 4097), 17),
        (320, 320, 3, 3): ((320, 2880), 12),
        (7, 0): ((7, 0), 0),
    }
    for shape, (slices, blocks) in cases.items():
        assert slice_shape(shape) == slices
        assert blocks_per_slice(slices[1]) == blocks
        assert absmax_shape(shape) == (slices[0], blocks)


# --- law 11: decay --------------------------------------------------------------------------------


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


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [quantize_blockwise, came8bit.quantize_blockwise])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_encoding_wants_fp32(encode, dtype):
    with pytest.raises((TypeError, RuntimeError), match=r"expected torch\.float32; cast first"):
        encode(torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("decode", [dequantize_blockwise, came8bit.dequantize_blockwise])
def test_decoding_wants_int8_and_fp32(decode):
    for codes, absmax in itertools.product((torch.int8, torch.uint8), (torch.float32, torch.half)):
        if (codes, absmax) == (torch.int8, torch.float32):
            continue
        with pytest.raises(
            (TypeError, RuntimeError), match=r"expected .*torch\.int8 and .*float32"
        ):
            decode(torch.zeros(2, 4, dtype=codes), torch.zeros(2, 1, dtype=absmax))


@pytest.mark.parametrize("decode", [dequantize_blockwise, came8bit.dequantize_blockwise])
@pytest.mark.parametrize("shape", [(2, 300), (600,), ()])
def test_decoding_wants_the_scales_that_belong_to_the_codes(decode, shape):
    slices, blocks = absmax_shape(shape)
    for wrong in ((slices, blocks + 1), (slices + 1, blocks), (slices * blocks,), ()):
        with pytest.raises((ValueError, RuntimeError), match=rf"\({slices}, {blocks}\)"):
            decode(torch.zeros(shape, dtype=torch.int8), torch.zeros(wrong))


def test_unknown_map():
    match = r"got code map 'cubic', expected one of \['softsign', 'sqrt', 'uniform'\]"
    with pytest.raises(ValueError, match=match):
        quantize_blockwise(torch.zeros(4), code="cubic")
    with pytest.raises(ValueError, match=match):
        dequantize_blockwise(torch.zeros(4, dtype=torch.int8), torch.zeros(1, 1), code="cubic")


def test_inputs_are_left_alone():
    x = torch.randn(3, 300)
    before = x.clone()
    codes, absmax = came8bit.quantize_blockwise(x)
    kept = codes.clone(), absmax.clone()
    came8bit.dequantize_blockwise(codes, absmax)
    assert torch.equal(x, before)
    assert torch.equal(codes, kept[0])
    assert torch.equal(absmax, kept[1])


def test_constants_of_the_header_are_those_of_the_reference():
    assert quant.DECAY_BIAS == 2.0**-14
    assert np.float32(1) / np.float32(127) == quant._INVERSE_127
    assert np.float32(127) * np.float32(quant._INVERSE_127) == 1
