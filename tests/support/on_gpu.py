"""Problems on a GPU: moved there as they lie in memory, stepped, and compared with the reference.

``CAME8BIT_CUDA_TESTS_ON_SHIM=1`` runs the tests that compare bits without a GPU, on the shim
(``tests/shim``): to try the tests themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from problems import Problem, assert_same_bits, run_ops
from shim.cases import SHIM_TREE, run_reference
from shim.library import kernels, plain
from torch import Tensor

from came8bit.ops import libraries
from came8bit.reference.reduction import CUDA_TREE

ON_SHIM = bool(os.environ.get("CAME8BIT_CUDA_TESTS_ON_SHIM"))
DEVICE = "cpu" if ON_SHIM else "cuda"
TREE = SHIM_TREE if ON_SHIM else CUDA_TREE

needs_gpu = pytest.mark.skipif(
    not (ON_SHIM or torch.cuda.is_available()), reason="torch finds no GPU here"
)
"""Goes with ``pytest.mark.cuda``. On a GPU a skip is a failure (tools/gpu_report.py)."""

needs_real_gpu = pytest.mark.skipif(ON_SHIM, reason="the shim has no streams and no memory")


def check_kernels() -> None:
    """Fail, not skip: a GPU without the kernels would compare the reference with itself."""
    if not ON_SHIM:
        status = libraries.status().cuda
        assert status.loaded, f"{status.reason}. To get them, {status.cure}"


def on_gpu(x: Tensor) -> Tensor:
    """A copy on the device with the strides of ``x`` and its distance from aligned memory."""
    storage = x.untyped_storage()
    copied = storage.clone() if ON_SHIM else storage.cuda()
    empty = torch.empty(0, dtype=x.dtype, device=DEVICE)
    return empty.set_(copied, x.storage_offset(), x.size(), x.stride())


def to_gpu(problem: Problem) -> Problem:
    """The same problem on the device; the original stays where it is."""
    state = {name: on_gpu(x) for name, x in problem.state.items()}
    return Problem(on_gpu(problem.param), state, problem.factored, problem.index, problem.offset)


@contextlib.contextmanager
def gpu_operators() -> Iterator[None]:
    """Within it ``_ops`` are the CUDA kernels: as they are, or on the shim."""
    if not ON_SHIM:
        yield
        return
    plain()
    with kernels():
        yield


def step(problems: list[Problem], grads: list[Tensor], **options: object) -> None:
    """One operator call on the device, gradients moved there first."""
    on_device = {k: on_gpu(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    with gpu_operators():
        run_ops(problems, [on_gpu(grad) for grad in grads], **on_device)


def check_step(
    got: list[Problem], expected: list[Problem], grads: list[Tensor], what: str, **options: object
) -> None:
    """Step both, and compare parameters and all state to the last bit."""
    step(got, grads, **options)
    for i, (mine, other) in enumerate(zip(got, expected, strict=True)):
        if other.param.numel() > 0:  # kernels leave an empty parameter alone
            run_reference(other, grads[i], TREE, **options)
        found = {name: x.cpu() for name, x in mine.outcome().items()}
        shape = tuple(other.param.shape)
        assert_same_bits(found, other.outcome(), f"{what}, parameter {i} {shape}")
