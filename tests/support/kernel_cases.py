"""Sizes at which a kernel takes another path."""

from __future__ import annotations

import math

import torch
from problems import assert_same_bits
from strategies import Case

from came8bit.ops import libraries

OPEN = {"clip_threshold": math.inf}
"""Without clipping the elements of an unfactored parameter know nothing of each other."""


def case_of(shape: tuple[int, ...], **changes: object) -> Case:
    values: dict[str, object] = dict(
        shape=shape, factored=True, batched=False, bits=8, dtype=torch.float32,
        grad_dtype=torch.float32, layout="contiguous", grad_layout="contiguous", index=3,
        offset=0, scale=1.0, zeros=0.1, seed=0,
    )  # fmt: skip
    return Case(**{**values, **changes})  # type: ignore[arg-type]


def check_against_reference(case: Case, steps: int, isas: list[str]) -> None:
    """Step the reference, and a copy with every instruction set; compare after each step."""
    expected = case.problem()
    copies = {isa: expected.copy() for isa in isas}
    for t, grad in enumerate(case.grads(steps), 1):
        expected.run_reference(grad, **case.options)
        for isa, problem in copies.items():
            libraries.set_cpu_isa(isa)
            problem.run_op(grad, **case.options)
            assert_same_bits(problem.outcome(), expected.outcome(), f"{isa}, step {t}, {case}")


# Gradients without zeros, so that no element decays, and a weight decay that shows in bf16.
DENSE: dict[str, object] = {"zeros": 0.0, "options": {"lr": 0.1, "weight_decay": 0.5}}
AHEAD: dict[str, object] = {"options": {"nesterov": True, "bias_correction": True}}

# Sizes at which something else begins, which random examples would meet too rarely.
SHAPES: list[tuple[tuple[int, ...], dict[str, object]]] = [
    ((1, 1), {}),
    ((4097, 3), {}),  # many slabs
    ((3, 4097), {}),  # many strips, an odd end
    ((255, 257), {}),
    ((257, 255), {}),
    ((256, 256), {}),  # 65,536 elements: the largest parameter of one thread
    ((129, 1025), {"dtype": torch.bfloat16}),
    ((4095, 33), {"grad_dtype": torch.float16}),
    # Rows of half a vector or one, 64 elements of which go together unless a row decays or is tiny.
    ((1030, 8), {"zeros": 0.005}),
    ((1030, 8), {"dtype": torch.bfloat16, "grad_dtype": torch.bfloat16}),
    ((1030, 8), {"dtype": torch.float16, "grad_dtype": torch.float16}),
    ((1030, 8), {"bits": 32, "grad_layout": "reversed"}),
    ((1030, 8), {"bits": 4}),
    ((1030, 8), {"factored": False}),
    ((1030, 8), {"scale": 1e-40, "zeros": 0.0, "options": {"eps1": 1e-16}}),
    ((1030, 16), {"zeros": 0.005, "dtype": torch.bfloat16}),
    ((1030, 16), {"bits": 32}),
    ((1030, 16), {"bits": 2}),
    ((7, 50, 16), {"batched": True}),
    ((7, 50, 8), {"batched": True, "bits": 32}),  # rows of two matrices in one piece
    ((16, 16, 3, 3), {"layout": "channels_last", "grad_layout": "channels_last"}),
    ((16, 16, 3, 3), {"batched": True, "layout": "channels_last"}),
    ((3, 70, 300), {"batched": True}),  # blocks that begin in the middle of rows
    ((3, 70, 256), {"batched": True}),  # and that do not
    ((2, 3, 5, 1030), {"batched": True, "dtype": torch.float16}),
    ((), {"factored": False, "bits": 32}),
    ((1,), {"factored": False, "bits": 32}),
    ((65537,), {"factored": False, "bits": 32, "dtype": torch.bfloat16}),
    ((65537,), {"factored": False, "dtype": torch.bfloat16}),
    ((4099,), {"factored": False, "bits": 4}),
    ((4099,), {"factored": False, "bits": 2}),
    ((4096, 1), {"factored": False}),
    ((257, 256), {"factored": False, "grad_layout": "reversed"}),
]
