"""Parameters of more than 2**32 elements, in address space that is never filled.

Only the last rows have a gradient, and of the large grids only the last blocks are run. What the
others would have added is zero, and so is the workspace that they would have written, so the result
is that of a whole step. An index that does not fit into 32 bits ends up at another element, or
nowhere.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from problems import Problem, make_problem, run_ops
from torch import Tensor

from came8bit.ops import schema
from came8bit.reference.rungs import RUNGS

from .cases import assert_same_bits, run_shim_reference
from .control import Control
from .library import kernels

COLUMNS = 1 << 16
ROWS = (1 << 16) + 8
"""The last 8 rows are behind element 2**32, and a tile of their own for all sweeps."""

BLOCK = 256
RATE = 0.5


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose pages exist once they are written to."""
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, max(size, 1), flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


@contextmanager
def uninitialised_memory_is_zero() -> Iterator[None]:
    """Within it workspaces are full of zeros, also where glibc hands out what was used before."""
    perturb = -6  # M_PERTURB: fresh memory is filled with the complement of this byte
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(perturb, 0xFF) != 1:
        raise RuntimeError("mallopt refused M_PERTURB")
    try:
        with kernels():
            yield
    finally:
        mallopt(perturb, 0)


def resident_bytes() -> int:
    """Memory that this process has in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def check_factored(control: Control, bits: int = 8, contiguous: bool = True) -> None:
    """A step of a (65544, 65536) matrix.

    Without ``contiguous`` the gradient has strides, which takes the path that goes element by
    element. There the last block of sweep C is 2048 elements of the last row, not 64 rows.
    """
    columns = slice(COLUMNS - BLOCK, COLUMNS)
    rows = slice(1 << 16 if contiguous else ROWS - 1, ROWS)
    param = zeros((ROWS, COLUMNS), torch.bfloat16)
    if contiguous:
        grad = zeros((ROWS, COLUMNS), torch.bfloat16)
    else:
        grad = zeros((ROWS, COLUMNS + 8), torch.bfloat16)[:, :COLUMNS]
    signs = (torch.rand(ROWS - rows.start, BLOCK) < 0.5).to(torch.bfloat16) * 2 - 1
    grad[rows, columns] = signs
    state = make_problem((1, 1), bits=bits, generator=torch.Generator()).state
    rung, shape = RUNGS.get(bits), (ROWS, COLUMNS)
    if rung is None:
        state["exp_avg"] = zeros(shape, torch.float32)
    else:
        state["exp_avg"] = zeros(rung.codes_shape(shape), rung.code_dtype)
        state["absmax"] = zeros(rung.scales_shape(shape), rung.scale_dtype)
    for name in ("sq", "res"):
        state[f"exp_avg_{name}_row"] = torch.zeros(1, ROWS)
        state[f"exp_avg_{name}_col"] = torch.zeros(1, COLUMNS)
    problem = Problem(param, state, True)
    # Sums over rows and columns have 513 blocks, sweeps A and B 33 * 16, C many more: of the sweeps
    # only the last is run.
    control.configure(tail=1, whole=520)
    before = resident_bytes()
    with uninitialised_memory_is_zero():
        run_ops([problem], [grad], lr=RATE, weight_decay=0.0, clip_threshold=math.inf)
    assert resident_bytes() - before < 1 << 30, "the kernels went through all of the memory"
    assert int(state["step"]) == 1
    moved = param[rows, columns]
    # All elements have the same statistics, so the update is of one size, against the gradient.
    assert torch.equal(moved.sign(), -signs)
    assert float(moved.float().abs().min()) >= 0.9 * float(moved.float().abs().max()) > 0
    stored, scales = state["exp_avg"][rows], state.get("absmax")
    if rung is not None:
        stored = rung.decode(stored, state["absmax"][rows], (len(signs), COLUMNS))
    momentum = stored[:, columns]
    assert torch.equal(momentum.sign(), signs.float())
    assert int((momentum.abs() == momentum.abs().max()).sum()) == momentum.numel()
    if scales is not None:
        assert bool((scales[rows, -1] > 0).all())
        assert int((scales[: len(signs)] != 0).sum()) == 0
    for x in (param, state["exp_avg"]):  # where indices of 32 bits would lead
        assert int((x[: 2 * len(signs)] != 0).sum()) == 0
        before_block = x.shape[1] - x.shape[1] * BLOCK // COLUMNS
        assert int((x[rows, :before_block] != 0).sum()) == 0
    row, col = state["exp_avg_sq_row"][0], state["exp_avg_sq_col"][0]
    for statistic, large in ((row, row[rows]), (col, col[columns])):
        assert int((statistic > 1e-12).sum()) == len(large)
        assert float(large.min()) == float(large.max()) > 1e-12


def check_flat(control: Control, bits: int = 8) -> None:
    """A step of an unfactored parameter of 2**32 + 1000 elements."""
    size, tail = (1 << 32) + 1000, 1000
    param, grad = zeros((size,), torch.bfloat16), zeros((size,), torch.bfloat16)
    signs = (torch.rand(tail) < 0.5).to(torch.bfloat16) * 2 - 1
    grad[-tail:] = signs
    state = make_problem((1,), factored=False, bits=bits, generator=torch.Generator()).state
    if bits == 8:
        state["exp_avg"] = zeros((size,), torch.int8)
        state["absmax"] = zeros((1, -(-size // BLOCK)), torch.float32)
    else:
        state["exp_avg"] = zeros((size,), torch.float32)
    state["exp_avg_sq"] = zeros((size,), torch.float32)
    problem = Problem(param, state, False)
    control.configure(head=1, tail=2)  # the first one also counts the step
    with uninitialised_memory_is_zero():
        run_ops([problem], [grad], lr=RATE, weight_decay=0.0, clip_threshold=math.inf)
    assert int(state["step"]) == 1
    assert torch.equal(param[-tail:].sign(), -signs)
    assert torch.equal(state["exp_avg"][-tail:].sign().float(), signs.float())
    second = state["exp_avg_sq"][-tail:]
    assert float(second.min()) == float(second.max()) > 1e-12
    for x in (param, state["exp_avg"], state["exp_avg_sq"]):
        assert int((x[: 4 * tail] > 1e-12).sum()) == 0
        assert int((x[-5 * tail : -tail] > 1e-12).sum()) == 0


def check_codec(control: Control) -> None:
    """Codes of 2**32 + 1000 values, and back."""
    size, tail = (1 << 32) + 1000, 488
    x = zeros((size,), torch.float32)
    x[-tail:] = torch.randn(tail, generator=torch.Generator().manual_seed(0))
    control.configure(tail=1)
    with kernels():
        codes, absmax = schema.quantize_blockwise(x)
        small_codes, small_absmax = schema.quantize_blockwise(x[-tail:].clone())
        assert torch.equal(codes[-tail:], small_codes)
        assert torch.equal(absmax[0, -2:], small_absmax[0])
        values = schema.dequantize_blockwise(codes, absmax)
        assert torch.equal(values[-tail:], schema.dequantize_blockwise(small_codes, small_absmax))


def check_strides(control: Control) -> None:
    """Elements that lie 2**31 apart: few of them, so this is a comparison with the reference."""
    shape = (3, 40)
    memory = zeros((3 * ((1 << 31) + 64) + 99,), torch.bfloat16)
    grad_memory = zeros((3 * ((1 << 31) + 32) + 99,), torch.bfloat16)
    problem = make_problem(shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    grad = grad_memory.as_strided(shape, ((1 << 31) + 32, 2))
    grad.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    expected = problem.copy()
    problem.param = memory.as_strided(shape, ((1 << 31) + 64, 2)).copy_(problem.param)
    control.configure()
    with kernels():
        run_ops([problem], [grad])
    run_shim_reference(expected, grad)
    assert_same_bits(problem.tensors(), expected.tensors(), "strides of 2**31")


CHECKS: dict[str, Callable[[Control], None]] = {
    "strides": check_strides,
    "codec": check_codec,
    "flat, 8 bits": check_flat,
    "flat, fp32": lambda control: check_flat(control, bits=32),
    "factored, 8 bits": check_factored,
    "factored, fp32": lambda control: check_factored(control, bits=32),
    "factored, strided": lambda control: check_factored(control, contiguous=False),
    "factored, 4 bits": lambda control: check_factored(control, bits=4),
    "factored, 4 bits, strided": lambda control: check_factored(control, 4, contiguous=False),
    "factored, 2 bits": lambda control: check_factored(control, bits=2),
}
