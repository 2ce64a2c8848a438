"""Every check of options, parameters and gradients, before anything changes.

Options are checked when a group is added, when one is loaded, and at every step, because
schedulers and users write into ``param_groups`` as they like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .state.layout import FACTORED_VIEWS, OPTIM_BITS
from .state.store import StepItem

FORMAT_VERSION = 1
"""Version of the state; in every group, where tools that rewrite state dicts leave it alone."""

DEFAULT_SEED = 0x63616D65
"""Key of the stochastic rounding: a constant, so that replicas draw the same bits."""

CHOICES: dict[str, tuple[object, ...]] = {
    "optim_bits": OPTIM_BITS,
    "rounding": ("stochastic", "nearest"),
    "nonfinite": ("skip", "raise", "propagate"),
    "factored_view": FACTORED_VIEWS,
}
_FLAGS = ("cautious", "maximize", "bias_correction", "nesterov")

ADDED_OPTIONS: dict[str, object] = {"nesterov": False}
"""Options that older versions did not save, with the values that describe what they did."""

_LARGEST = 3.4028235677973366e38  # rounds to infinity in fp32 from here on
_SMALLEST = 2.0**-150  # rounds to 0 in fp32 up to here
_ONE = 1.0 - 2.0**-25  # rounds to 1 in fp32 from here on


def check_options(group: Mapping[str, Any]) -> None:
    """Raise a :class:`ValueError` that says what was got and expected if an option is wrong."""
    check_lr(group["lr"])
    betas, eps = group["betas"], group["eps"]
    if not (_numbers(betas, 3) and all(0.0 <= float(beta) < _ONE for beta in betas)):
        raise ValueError(
            f"got betas {betas!r}, expected three numbers in [0, 1) that fp32 tells from 1, "
            "such as (0.9, 0.999, 0.9999)"
        )
    if not (_numbers(eps, 2) and all(_SMALLEST < float(value) < _LARGEST for value in eps)):
        raise ValueError(
            f"got eps {eps!r}, expected two finite positive numbers that are not 0 in fp32, "
            "such as (1e-30, 1e-16)"
        )
    threshold, decay = group["clip_threshold"], group["weight_decay"]
    if not (isinstance(threshold, Real) and float(threshold) > _SMALLEST):
        raise ValueError(
            f"got clip_threshold {threshold!r}, expected a positive number (inf: no clipping)"
        )
    if not (isinstance(decay, Real) and 0.0 <= float(decay) < _LARGEST):
        raise ValueError(f"got weight_decay {decay!r}, expected a finite number >= 0")
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"got {name} {group[name]!r}, expected one of {allowed}")
    for name in _FLAGS:
        if not isinstance(group[name], bool):
            raise ValueError(f"got {name} {group[name]!r}, expected True or False")
    size, seed = group["min_8bit_size"], group["seed"]
    if not (isinstance(size, Integral) and int(size) >= 0):
        raise ValueError(f"got min_8bit_size {size!r}, expected an integer >= 0")
    if not (isinstance(seed, Integral) and 0 <= int(seed) < 2**63):
        raise ValueError(f"got seed {seed!r}, expected an integer in [0, 2**63)")


def check_lr(lr: object) -> None:
    """Check a learning rate; a tensor's value only where reading it costs no synchronisation."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(
                f"Tensor lr must be 1-element and real, got {lr.dtype} of shape {tuple(lr.shape)}"
            )
        if lr.device.type != "cpu":
            return
        value = float(lr)
    elif isinstance(lr, Real):
        value = float(lr)
    else:
        raise ValueError(f"got lr {lr!r}, expected a number or a tensor with one element")
    if not 0.0 <= value < _LARGEST:
        raise ValueError(f"got lr {lr!r}, expected a finite number >= 0")


def _numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(number, Real) for number in value)
    )


PARAM_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
GRAD_DTYPES = PARAM_DTYPES | {torch.float64}


def check_params(params: Iterable[object], present: Collection[int]) -> None:
    """Check the parameters of a new group.

    Args:
        params: tensors or ``(name, tensor)``; other things are left to the base class.
        present: ``id`` of every parameter that the optimizer has already.

    Raises:
        TypeError: wrong dtype or layout.
        ValueError: a parameter is there twice, or its elements share memory.
    """
    seen: set[int] = set()
    for position, entry in enumerate(params):
        param = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(param, Tensor):
            continue
        what = f"parameter {position} of the group (shape {tuple(param.shape)})"
        if id(param) in present:
            raise ValueError(
                f"some parameters appear in more than one parameter group: {what} does; "
                "list every parameter once"
            )
        if id(param) in seen:
            raise ValueError(
                f"got a parameter group with duplicate parameters: {what} is there twice; "
                "list every parameter once"
            )
        seen.add(id(param))
        if param.layout != torch.strided or param.dtype not in PARAM_DTYPES:
            raise TypeError(
                f"{what} is {param.dtype} with layout {param.layout}, expected a dense tensor "
                "of torch.float32, torch.bfloat16 or torch.float16"
            )
        strides = zip(param.shape, param.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in strides):
            raise ValueError(
                f"{what} has strides {param.stride()}: several elements share memory, so it "
                "cannot be updated in place; use param.contiguous()"
            )


def usable(param: Tensor, grad: Tensor) -> bool:
    """Whether a step can use ``grad`` for ``param``."""
    return (
        grad.dtype in GRAD_DTYPES
        and param.dtype in PARAM_DTYPES
        and grad.layout == torch.strided
        and grad.shape == param.shape
        and grad.device == param.device
    )


def unusable_error(param: Tensor, grad: Tensor, position: int) -> Exception:
    """The error to raise where :func:`usable` says no."""
    message = (
        f"parameter {position} is {param.dtype} of shape {tuple(param.shape)} on {param.device}: "
        f"got a gradient of {grad.dtype}, layout {grad.layout}, shape {tuple(grad.shape)} on "
        f"{grad.device}, expected a dense real floating-point one of the same shape on the same "
        "device, and a parameter of torch.float32, torch.bfloat16 or torch.float16"
    )
    wrong_type = grad.dtype not in GRAD_DTYPES or param.dtype not in PARAM_DTYPES
    return TypeError(message) if wrong_type or grad.layout != torch.strided else ValueError(message)


def moved_error(
    param: Tensor, state: Mapping[str, Tensor], shape: torch.Size | None, position: int
) -> Exception:
    """The error for a parameter that is no longer what its state was made for, of ``shape``."""
    if shape is None:
        return ValueError(
            f"the state of parameter {position} (shape {tuple(param.shape)}) is not complete: it "
            f"has {sorted(state)} and there is no page with the rest; use load_state_dict() to "
            "give an optimizer its state"
        )
    return ValueError(
        f"parameter {position} has shape {tuple(param.shape)} on {param.device}, its state was "
        f"made for shape {tuple(shape)} on {state['step'].device}; move the model "
        "before the first step, or save state_dict(), make a new optimizer and load it"
    )


def check_finite(work: Iterable[StepItem]) -> None:
    """Look at the norm of every gradient; waits for each device once.

    Raises:
        FloatingPointError: some are not finite; the message lists them.
    """
    by_device: defaultdict[torch.device, list[StepItem]] = defaultdict(list)
    for item in work:
        by_device[item.grad.device].append(item)
    bad: list[StepItem] = []
    for items in by_device.values():
        norms = torch._foreach_norm([item.grad for item in items], 2, torch.float32)
        finite = torch.stack(list(norms)).isfinite().tolist()
        bad += [item for item, good in zip(items, finite, strict=True) if not good]
    if bad:
        listed = ", ".join(f"{item.position} (shape {tuple(item.param.shape)})" for item in bad)
        raise FloatingPointError(
            f"the gradient of parameter {listed} is not finite; "
            'nonfinite="skip" would leave such parameters out of the step'
        )
