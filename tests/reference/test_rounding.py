"""Random bits, stochastic rounding and square roots: ``came8bit/rounding.py`` and the kernels'.

The rules under test are those that ``rounding.py`` states. That a step of the optimizer draws the
bits of the right parameter, step and element is in ``test_deviations.py`` and ``test_optim.py``.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import make_problem

from came8bit.ops import libraries
from came8bit.reference.rounding import philox, random_bits, round_stochastic, square_root

ISAS = libraries.supported_cpu_isas()
CPU = torch.device("cpu")
LOW = [torch.bfloat16, torch.float16]

SEED = 2**62 + 12345  # both words of the key are in use

#: Random bits that decide: all 16 in bf16, the upper 13 for a normal fp16, 16 below 2**-14.
EVERY_DRAW = torch.arange(1 << 16)


def patterns_fp32(patterns) -> torch.Tensor:
    return torch.as_tensor(np.asarray(patterns, dtype=np.uint32).view(np.float32).copy())


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type as fp32."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).to(torch.float32)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def neighbours(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of ``dtype`` on either side of ``value`` by magnitude (equal if it is one)."""
    near = value.to(dtype)
    toward_zero = near.float().abs() > value.abs()
    down = torch.where(toward_zero, torch.nextafter(near, torch.zeros_like(near)), near)
    outward = torch.copysign(torch.full_like(near, math.inf), value.to(dtype))
    up = torch.where(down.float() == value, down, torch.nextafter(down, outward))
    return down, up


# --- random bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    """The vectors that Random123 publishes for philox4x32-10."""
    low, high = (int(word, 16) for word in key.split())
    got = philox(tuple(torch.tensor([int(word, 16)]) for word in counter.split()), high << 32 | low)
    assert [f"{int(word):08x}" for word in got] == words.split()


def scalar_philox(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            b >> 32 ^ counter[1] ^ key[0],
            b % 2**32,
            a >> 32 ^ counter[3] ^ key[1],
            a % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@settings(deadline=None)
@given(
    element=st.integers(0, 2**55),
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**32 - 1),
    step=st.integers(1, 2**32 - 1),
)
@example(element=2**35 - 1, seed=1, index=0, step=1)  # the last one below a carry
@example(element=2**35, seed=1, index=0, step=1)
def test_the_bits_of_an_element(element, seed, index, step):
    """The written rule, for one element anywhere in a parameter of any size."""
    got = random_bits(1, seed=seed, index=index, step=step, offset=element, device=CPU)
    block, lane = divmod(element, 8)
    words = scalar_philox([block % 2**32, block >> 32, index, step], seed)
    assert got.tolist() == [words[lane // 2] >> 16 * (lane % 2) & 0xFFFF]


@settings(deadline=None)
@given(
    offset=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    seed=st.integers(0, 2**64 - 1),
)
def test_bits_of_a_slice_are_the_slice_of_the_bits(offset, cuts, seed):
    def bits(start, stop):
        return random_bits(
            stop - start, seed=seed, index=5, step=7, offset=offset + start, device=CPU
        )

    whole = bits(0, 300)
    assert whole.shape == (300,)
    edges = [0, *sorted(cuts), 300]
    parts = [bits(a, b) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_bits_depend_on_seed_index_step_and_element():
    base = dict(seed=1, index=2, step=3)
    whole = random_bits(4096, **base, device=CPU)
    for name in base:
        other = random_bits(4096, **{**base, name: base[name] + 1}, device=CPU)
        # Independent half-words agree with probability 2**-16; ten in 4096 would be 1e-19.
        assert (other == whole).sum() < 10
    high_half = random_bits(4096, seed=1 + 2**32, index=2, step=3, device=CPU)
    assert (high_half == whole).sum() < 10


def test_bits_are_uniform():
    """Mean and single bits of 2**18 draws, within five standard errors."""
    n = 1 << 18
    bits = random_bits(n, seed=3, index=0, step=1, device=CPU)
    assert 0 <= int(bits.min()) <= int(bits.max()) < 1 << 16
    mean = bits.double().mean().item()
    assert abs(mean - 32767.5) < 5 * 65536 / 12**0.5 / n**0.5
    for i in range(16):
        share = (bits >> i & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / n**0.5


def test_no_elements_no_bits():
    assert random_bits(0, seed=1, index=0, step=1, offset=3, device=CPU).shape == (0,)


# --- stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bits", [0, 1, 0x8000, 0xFFFF])
def test_exact_values_stay_exact(dtype, bits):
    """Every pattern of the type, infinities, NaN, subnormals and -0 among them, with any draw."""
    values = all_values(dtype)
    got = round_stochastic(values, dtype, torch.full(values.shape, bits))
    nan = values.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(as_bits(got)[~nan], as_bits(values.to(dtype))[~nan])


#: (name, dtype, values whose distribution over all draws is counted)
COUNTED = [
    ("normal bf16", torch.bfloat16, [1.001, -1.001, 3.14159, -1e-20, 1e30, 1.0 + 2.0**-23]),
    ("binade edge bf16", torch.bfloat16, [2 - 2.0**-20, -(2 - 2.0**-23), 0.99999994]),
    ("subnormal bf16", torch.bfloat16, [1e-39, -3e-41, 2.0**-149, 2.0**-126 - 2.0**-149]),
    ("normal fp16", torch.float16, [1.0003, -3.14159, 2047.7, 65472.5, 2.0**-14 + 2.0**-26]),
    ("binade edge fp16", torch.float16, [2 - 2.0**-12, -(4 - 2.0**-13)]),
    ("subnormal fp16", torch.float16, [1e-5, -3e-7, 2.0**-25, -(2.0**-14 - 2.0**-26)]),
    ("below the smallest fp16", torch.float16, [1e-8, -1e-9, 2.0**-40]),
]


@pytest.mark.parametrize(("dtype", "values"), [c[1:] for c in COUNTED], ids=[c[0] for c in COUNTED])
def test_over_all_draws_the_mean_is_the_value(dtype, values):
    """Counted, not sampled: over the 65,536 draws the mean is the value.

    Up to the resolution: 2**-16 of the spacing, 2**-13 for normal fp16 (cut, so one-sided). In bf16
    the sixteen bits that are cut off are all used, so there the mean is exact.
    """
    for x in torch.tensor(values, dtype=torch.float64).to(torch.float32):
        draws = round_stochastic(x.expand(1 << 16), dtype, EVERY_DRAW)
        down, up = neighbours(x, dtype)
        assert ((draws == down) | (draws == up)).all()
        gap = up.double() - down.double()
        wanted = ((x.double() - down.double()) / gap).item()
        share = (draws == up).double().mean().item()
        if dtype == torch.bfloat16:
            assert share == wanted
        else:
            resolution = 2.0**-13 if x.abs() >= 2.0**-14 else 2.0**-16
            assert wanted - resolution < share <= wanted
        assert torch.equal(draws.signbit(), x.signbit().expand(1 << 16))


@pytest.mark.parametrize("dtype", LOW)
def test_unbiased_with_the_bits_it_draws(dtype):
    """Mean over 20 steps of 100 copies of 256 values, in standard errors of their coins."""
    torch.manual_seed(0)
    steps, value = 2000, torch.randn(256)
    total = torch.zeros(256, dtype=torch.float64)
    for step in range(1, 21):
        bits = random_bits(25600, seed=11, index=0, step=step, device=CPU)
        total += round_stochastic(value.repeat(100), dtype, bits).view(100, 256).double().sum(0)
    down, up = (x.double() for x in neighbours(value, dtype))
    gap = (up - down).abs()
    share = ((value.double() - down).abs() / gap).nan_to_num(0.0)
    error = (total / steps - value.double()).abs()
    resolution = gap * 2.0**-13
    assert (error <= 5 * gap * (share * (1 - share) / steps).sqrt() + resolution).all()
    # And all of them together: one number, so its bound is three times as tight.
    z = ((total / steps - value.double()) / gap.clamp(min=1e-30)).sum().abs()
    assert z <= 5 * (share * (1 - share) / steps).sum().sqrt() + 256 * 2.0**-13


@settings(max_examples=300, deadline=None)
@given(pattern=st.integers(0, 2**32 - 1), bits=st.integers(0, 2**16 - 1))
@pytest.mark.parametrize("dtype", LOW)
def test_the_result_is_a_neighbour(dtype, pattern, bits):
    """For any fp32 pattern; sign kept; at and above the largest finite value as a cast does."""
    value = patterns_fp32([pattern])
    got = round_stochastic(value, dtype, torch.tensor([bits]))
    if value.isnan().item():
        assert got.isnan().item()
        return
    assert torch.equal(got.signbit(), value.signbit())
    if value.abs().item() >= torch.finfo(dtype).max:
        assert torch.equal(got, value.to(dtype))
        return
    down, up = neighbours(value, dtype)
    assert got.item() in (down.item(), up.item())
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", LOW)
def test_monotone_in_the_draw_and_in_the_value(dtype):
    """A larger draw never gives a smaller magnitude; with one draw, order is kept."""
    x = torch.tensor([1.0003, -0.7, 3e-6, 65503.0, 1e-39])
    for value in x:
        draws = round_stochastic(value.expand(1 << 16), dtype, EVERY_DRAW).float().abs()
        assert (draws.diff() >= 0).all()
    torch.manual_seed(0)
    values = (torch.randn(4096) * torch.exp(8 * torch.randn(4096))).sort().values
    values = values[values.abs() < torch.finfo(dtype).max]
    for bits in (0, 12345, 65535):
        got = round_stochastic(values, dtype, torch.full(values.shape, bits)).float()
        assert (got.diff() >= 0).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bits", [0, 0x7FFF, 0xFFFF])
def test_overflow_infinity_and_nan_are_cast(dtype, bits):
    largest = torch.tensor(torch.finfo(dtype).max)
    just_above = torch.nextafter(largest, torch.tensor(math.inf))
    unit = largest - torch.nextafter(largest.to(dtype), torch.zeros((), dtype=dtype)).float()
    half = largest + unit / 2  # the middle to what would come next: to even, that is infinity
    rows = [largest, just_above, torch.nextafter(half, largest), half, torch.tensor(math.inf)]
    x = torch.stack(rows + [-v for v in rows] + [torch.tensor(math.nan)])
    got = round_stochastic(x, dtype, torch.full(x.shape, bits))
    m = torch.finfo(dtype).max
    wanted = [m, m, m, math.inf, math.inf]
    assert got[:-1].tolist() == wanted + [-v for v in wanted]
    assert got[-1].isnan()
    # Below the largest value a draw cannot overflow.
    below = torch.nextafter(largest, torch.tensor(0.0))
    draws = round_stochastic(below.expand(1 << 16), dtype, EVERY_DRAW)
    assert draws.isfinite().all()
    assert draws.float().amax() == largest


def test_fp32_is_not_rounded():
    x = torch.randn(5)
    assert round_stochastic(x, torch.float32, torch.zeros(5, dtype=torch.int64)) is x


# --- square root ----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_square_root_is_correctly_rounded(seed):
    """numpy's root of fp32 is the processor's instruction, correctly rounded by IEEE 754."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 0x7F800001, (4096,), generator=generator).to(torch.int32)
    x = patterns.view(torch.float32)
    got = square_root(x)
    assert np.array_equal(got.numpy(), np.sqrt(x.numpy()))
    # And without trusting it: x lies between the squares of the middles to both neighbours.
    r = got.double()
    live = (x > 0) & (x < math.inf)
    down = torch.nextafter(got, torch.tensor(0.0)).double()
    up = torch.nextafter(got, torch.tensor(math.inf)).double()
    # 25-bit middles: their squares have at most 50 bits, exact in float64.
    assert (((r + down) / 2).square() <= x.double())[live].all()
    assert (x.double() <= ((r + up) / 2).square())[live].all()


def test_square_root_of_edges():
    x = torch.tensor([0.0, -0.0, 1.0, 4.0, math.inf, 2.0**-149, -1.0, math.nan])
    got = square_root(x)
    assert got[:6].tolist() == [0.0, -0.0, 1.0, 2.0, math.inf, fp32_root(2.0**-149)]
    assert math.copysign(1.0, got[1].item()) == -1.0
    assert got[6:].isnan().all()


def fp32_root(x: float) -> float:
    return float(np.sqrt(np.float32(x)))


# --- the kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [0, 3, 2**35 - 11])
def test_kernels_round_as_the_rule_says(isa, dtype, offset):
    """A step without gradient is p <- round(p - p*shrink): every pattern of the type goes through.

    ``shrink`` of 2**-10 moves each value off the grid, so the draw decides.
    """
    values = all_values(dtype)
    values = values[values.isfinite()]
    values = values.sort().values[: len(values) // 16 * 16].view(-1, 16)
    shape = tuple(values.shape)
    generator = torch.Generator().manual_seed(0)
    problem = make_problem(
        shape, factored=False, bits=32, dtype=dtype, index=9, offset=offset, generator=generator
    )
    problem.param.copy_(values.to(dtype))
    before = libraries.cpu_isa()
    libraries.set_cpu_isa(isa)
    try:
        options = dict(lr=1.0, weight_decay=2.0**-10, seed=SEED)
        problem.run_op(torch.zeros(shape, dtype=dtype), **options)
    finally:
        libraries.set_cpu_isa(before)
    exact = values.flatten() - values.flatten() * 2.0**-10
    bits = random_bits(exact.numel(), seed=SEED, index=9, step=1, offset=offset, device=CPU)
    wanted = round_stochastic(exact, dtype, bits)
    got = problem.param.flatten()
    assert torch.equal(as_bits(got), as_bits(wanted))
    assert (got.float() != exact.to(dtype).float()).any()  # nearest would have been another answer
