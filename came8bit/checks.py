"""What parameters and gradients must be, checked before a step or a new group changes anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PARAM_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
GRAD_DTYPES = PARAM_DTYPES | {torch.float64}


class Work(NamedTuple):
    """A parameter that has a gradient, its state, and its position in ``state_dict()``."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    position: int


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


def check_finite(work: Iterable[Work]) -> None:
    """Look at the norm of every gradient; waits for each device once.

    Raises:
        FloatingPointError: some are not finite; the message lists them.
    """
    by_device: defaultdict[torch.device, list[Work]] = defaultdict(list)
    for item in work:
        by_device[item.grad.device].append(item)
    bad: list[Work] = []
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
