"""The laws of the 8-bit code.

``came8bit/reference/quant.py`` is the specification, ``csrc/quant.h`` the kernels' version of it.
Laws 1 to 6 are checked for every one of the 65,536 bf16 patterns, in blocks of many scales, and for
random fp32 tensors beyond; law 10 (``test_quant_kernels.py``) says that the kernels have the same
bits, so the others hold for them. Law 11 is in ``test_quant_decay.py``.

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
from code_blocks import (
    EXCESS_IN_VALUE,
    ISAS,
    SCALES,
    VALUE_ROUNDING,
    all_bf16,
    all_levels,
    check_against_brute_force,
    fp32,
    in_blocks,
    same_bits,
)

import came8bit
from came8bit.ops import libraries
from came8bit.reference import quant
from came8bit.reference.quant import (
    CODE_MAPS,
    NAN_CODE,
    SMALLEST_ABSMAX,
    absmax_shape,
    dequantize_blockwise,
    quantize_blockwise,
)


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
