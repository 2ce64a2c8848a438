"""The declarative list of state buffers: which view, which bits, how many bytes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from tolerances import GPT2_BYTES, LLAMA_BYTES

from benchmarks.state_bytes import gpt2_small, llama_7b, table
from came8bit.reference.rungs import momentum_shape
from came8bit.state import store as dense
from came8bit.state.layout import FACTORED_VIEWS, OPTIM_BITS, plan, possible_layouts, state_bytes

# shape, view with "smallest" (None: unfactored), view with "last_two", bits of the momentum
TABLE = [
    ((), None, None, 32),
    ((4096,), None, None, 32),
    ((100_000,), None, None, 32),
    ((4096, 4096), (1, 4096, 4096), (1, 4096, 4096), 8),
    ((63, 65), (1, 63, 65), (1, 63, 65), 32),  # 4095 elements
    ((64, 64), (1, 64, 64), (1, 64, 64), 8),  # 4096 elements
    ((4096, 8), (1, 4096, 8), (1, 4096, 8), 8),
    ((8, 4096), (1, 8, 4096), (1, 8, 4096), 8),
    ((4096, 3), (1, 4096, 3), (1, 4096, 3), 8),
    ((4096, 2), None, (1, 4096, 2), 8),
    ((4096, 1), None, (1, 4096, 1), 32),  # a scale per value would cost more than fp32
    ((1, 4096), None, (1, 1, 4096), 8),
    ((4, 4), None, (1, 4, 4), 32),
    ((5, 5), (1, 5, 5), (1, 5, 5), 32),
    ((64, 64, 3, 3), (1, 64, 576), (4096, 3, 3), 8),
    ((320, 320, 1, 1), (1, 320, 320), (102_400, 1, 1), 8),
    ((768, 1, 7, 7), (1, 768, 49), (768, 7, 7), 8),  # depthwise
    ((256, 1, 3), (1, 256, 3), (256, 1, 3), 32),
    ((8, 1024, 512), (8, 1024, 512), (8, 1024, 512), 8),  # stacked experts stay batched
    ((2, 2, 2), None, (2, 2, 2), 32),
]


@pytest.mark.parametrize(("shape", "smallest", "last_two", "bits"), TABLE)
def test_view_and_bits(shape, smallest, last_two, bits):
    for option, view in (("smallest", smallest), ("last_two", last_two)):
        layout = plan(shape, factored_view=option)
        assert layout.factored == (view is not None)
        assert layout.momentum_bits == bits
        assert math.prod(layout.view) == math.prod(shape)
        if view is not None:
            assert layout.view == view
        assert plan(shape, factored_view=option, optim_bits=32).momentum_bits == 32


def test_equal_views_take_the_first_of_the_list():
    # One matrix: batched last two and first against rest are the same; (1, n, k) has n + k against
    # 1 + n k. Where factored and unfactored tie in bytes, factored wins: 8 (n + k) + 4 is never
    # a multiple of 16 less than 4 n k by accident, so a tie needs 2 (n + k) + 1 = n k.
    assert plan((40, 40)).view == (1, 40, 40)
    assert plan((1, 40, 40)).view == (1, 40, 40)
    n, k = 3, 7
    assert 2 * (n + k) + 1 == n * k
    assert plan((n, k)).factored


SHAPES = st.lists(st.integers(1, 40), max_size=4).map(tuple) | st.tuples(
    st.integers(1, 5000), st.integers(1, 40)
)


def statistics_bytes(view):
    b, n, k = view
    return 4 * (2 * b * n + 2 * b * k + 1)


@given(SHAPES, st.sampled_from(OPTIM_BITS), st.sampled_from([0, 4096]))
def test_smallest_is_the_smallest(shape, bits, min_8bit_size):
    layout = plan(shape, optim_bits=bits, min_8bit_size=min_8bit_size)
    numel = math.prod(shape)
    candidates = [4 * numel]
    if len(shape) >= 2:
        candidates.append(statistics_bytes((math.prod(shape[:-2]), shape[-2], shape[-1])))
        candidates.append(statistics_bytes((1, shape[0], numel // shape[0])))
    momentum = [4 * numel]
    if bits < 32 and len(shape) >= 2 and numel >= min_8bit_size:
        slice_len, block = numel // max(1, shape[0]), 256 if bits == 8 else 128
        code_bytes, scale_bytes = -(-slice_len * bits // 8), {8: 4, 4: 2, 2: 4, 0: 0}[bits]
        momentum.append(shape[0] * (code_bytes + scale_bytes * -(-slice_len // block)))
    assert layout.nbytes == min(candidates) + min(momentum) + 16
    official = plan(shape, optim_bits=bits, min_8bit_size=min_8bit_size, factored_view="last_two")
    assert layout.nbytes <= official.nbytes
    assert layout in possible_layouts(shape) or numel < min_8bit_size
    assert official.factored == (len(shape) >= 2)


@given(SHAPES, st.sampled_from(OPTIM_BITS), st.sampled_from(FACTORED_VIEWS))
def test_allocation_is_what_the_layout_says(shape, bits, view):
    layout = plan(shape, optim_bits=bits, min_8bit_size=0, factored_view=view)
    state = dense.allocate(layout, torch.device("meta"))
    assert list(state) == [buffer.name for buffer in layout.buffers]
    assert sum(tensor.nbytes for tensor in state.values()) == layout.nbytes
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert momentum_shape(state, shape) == shape


def test_initial_values():
    state = dense.allocate(plan((64, 64)), torch.device("cpu"))
    assert state["rms_ratio"].item() == 1.0
    others = [tensor for name, tensor in state.items() if name != "rms_ratio"]
    assert not any(tensor.any() for tensor in others)


@pytest.mark.parametrize(
    ("shapes", "parameters", "bound"),
    [(llama_7b(), 6_738_415_616, LLAMA_BYTES), (gpt2_small(), 124_439_808, GPT2_BYTES)],
    ids=["llama-7b", "gpt2-small"],
)
def test_bytes_per_parameter(shapes, parameters, bound):
    numel = sum(map(math.prod, shapes))
    assert numel == parameters
    assert 1.0 < state_bytes(shapes) / numel <= bound
    # The fp32 optimizer needs four bytes and the official view more on convolutions.
    assert state_bytes(shapes, optim_bits=32) / numel > 4.0


def test_bad_options():
    with pytest.raises(ValueError, match=r"got optim_bits 5, expected one of \(32, 8, 4, 2, 0\)"):
        plan((4, 4), optim_bits=5)
    with pytest.raises(ValueError, match="got factored_view 'rows', expected one of"):
        plan((4, 4), factored_view="rows")


def test_the_table_in_the_docs_is_the_one_that_is_printed():
    printed = table()
    documented = (ROOT / "docs" / "internals" / "algorithm.md").read_text(encoding="utf-8")
    assert "\n".join(printed) in documented
