"""The 8-bit code of the kernels is that of the reference (law 10 of ``test_quant.py``)."""

from __future__ import annotations

import math

import pytest
import torch
from code_blocks import (
    ISAS,
    SCALES,
    all_bf16,
    all_levels,
    check_against_brute_force,
    fp32,
    in_blocks,
    same_bits,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import came8bit
from came8bit.ops import libraries
from came8bit.reference.quant import (
    BLOCK_SIZE,
    NAN_CODE,
    SMALLEST_ABSMAX,
    absmax_shape,
    blocks_per_slice,
    dequantize_blockwise,
    quantize_blockwise,
    slice_shape,
)

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
    layout = draw(st.sampled_from(LAYOUTS))
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
