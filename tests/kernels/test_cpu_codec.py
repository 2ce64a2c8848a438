"""The 8-bit code in the CPU kernels, by itself: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same_bits, near_code_edges, random_grad
from strategies import Case, cases, kernel_isas, laid_out

from came8bit.ops import libraries, schema
from came8bit.reference import quant

pytestmark = pytest.mark.kernels


@settings(max_examples=50)
@given(cases(), st.sampled_from(["", "nan", "inf", "subnormal"]))
def test_codec_has_the_bits_of_the_reference(case: Case, special: str) -> None:
    x = random_grad(case.shape, torch.float32, torch.Generator().manual_seed(case.seed))
    x = x * (1e-38 if special == "subnormal" else case.scale)
    if special in ("nan", "inf"):
        x.view(-1)[x.numel() // 2 :: 97] = float(special)
    x = laid_out(x, case.layout)
    codes, absmax = quant.quantize_blockwise(x)
    decoded = quant.dequantize_blockwise(codes, absmax)
    expected = {"codes": codes, "absmax": absmax, "decoded": decoded}
    for isa in kernel_isas():
        libraries.set_cpu_isa(isa)
        codes, absmax = schema.quantize_blockwise(x)
        got = {
            "codes": codes,
            "absmax": absmax,
            "decoded": schema.dequantize_blockwise(codes, absmax),
        }
        assert_same_bits(got, expected, f"{isa} {tuple(x.shape)} {x.stride()}")


def test_codec_at_the_edges_between_levels() -> None:
    """Values at and next to where one code ends and the next begins."""
    x = near_code_edges()
    codes, scales = quant.quantize_blockwise(x)
    assert torch.equal(scales, x[:, :1])
    level = (x.abs() / scales).double().sqrt() * 127
    assert 0.2 < (codes.abs() > level)[:, 1:].double().mean() < 0.8
    for isa in kernel_isas():
        libraries.set_cpu_isa(isa)
        got, _ = schema.quantize_blockwise(x)
        assert_same_bits({"codes": got}, {"codes": codes}, isa)
