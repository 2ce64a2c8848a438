"""Every check of options, parameters and gradients, before anything changes.

Options are checked when a group is added, when one is loaded, and at every step, because
schedulers and users write into ``param_groups`` as they like.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .overlap import elements_overlap, sharing
from .state.layout import (
    FACTORED_VIEWS,
    OPTIM_BITS,
    Group,
    Layout,
    plan_state,
    warn_of_large_vectors,
)
from .state.sharding import PLAIN, check_shard, is_sharded, local

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
_FLAGS = ("cautious", "maximize", "bias_correction", "nesterov", "quantize_vectors")

ADDED_OPTIONS: dict[str, object] = {"nesterov": False, "stream": None, "quantize_vectors": False}
"""Options that older versions did not save, with the values that describe what they did."""

_FLOATS = ("lr", "clip_threshold", "weight_decay")
_INTEGERS = ("optim_bits", "min_8bit_size", "seed", "stream")
_DEFAULT_BETAS = (0.9, 0.999, 0.9999)
_WORDS = {"true": True, "false": False}

# What bitsandbytes and torch optimizers take besides, with the values that mean what happens here.
_FOREIGN: dict[str, tuple[object, ...]] = {
    "amsgrad": (False,),
    "args": (None,),
    "block_wise": (True,),
    "capturable": (None, False),
    "differentiable": (False,),
    "foreach": (None, False),
    "fused": (None, False),
    "percentile_clipping": (100,),
}

_LARGEST = 1e9  # of lr and weight decay; 1e38 makes a parameter infinite in two steps
_SMALLEST = 2.0**-150  # rounds to 0 in fp32 up to here
_ONE = 1.0 - 2.0**-25  # rounds to 1 in fp32 from here on
_LARGEST_EPS = 1.0  # sums of squares stay far from infinity
_ADAM_EPS = 1e-16  # above it, eps[0] looks like Adam's, which is not added to squares


def normalized(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in ``group`` that are written otherwise than :func:`check_options` wants.

    Configuration files and command lines turn numbers into strings, and Adam's users give two
    betas: ``"1e-4"`` is a number, ``"true"`` a flag, ``8.0`` an integer, and the third of two betas
    is CAME's default. What means nothing else is left for :func:`check_options` to refuse.
    """
    changed: dict[str, Any] = {}
    for name in _FLOATS:
        if isinstance(group.get(name), (str, Decimal)):
            changed[name] = _number(group[name])
    for name in _INTEGERS:
        value = _number(group.get(name))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        changed[name] = value
    for name in _FLAGS:
        value = group.get(name)
        if isinstance(value, str):
            changed[name] = _WORDS.get(value.strip().lower(), value)
    for name in ("betas", "eps"):
        value = group.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            numbers = tuple(map(_number, value))
            if name == "betas" and len(numbers) == 2:
                numbers += _DEFAULT_BETAS[2:]
            if not (isinstance(value, (tuple, list)) and list(value) == list(numbers)):
                changed[name] = numbers
    return {name: value for name, value in changed.items() if name in group}


def check_foreign(options: Mapping[str, object]) -> None:
    """Check keyword arguments of other optimizers: those that mean the same here are fine.

    Raises:
        TypeError: one is unknown, or asks for something that CAME does not have.
    """
    for name, value in options.items():
        if name not in _FOREIGN:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        if isinstance(value, Tensor) or value not in _FOREIGN[name]:
            raise TypeError(
                f"got {name}={value!r}, which CAME does not have; leave it out or pass "
                f"{name}={_FOREIGN[name][0]!r}"
            )


def check_options(group: Mapping[str, Any]) -> None:
    """Raise a :class:`ValueError` that says what was got and expected if an option is wrong."""
    check_lr(group["lr"])
    betas, eps = group["betas"], group["eps"]
    if not (_numbers(betas, 3) and all(0.0 <= float(beta) < _ONE for beta in betas)):
        raise ValueError(
            f"got betas {betas!r}, expected three numbers in [0, 1) that stay below 1 in float32, "
            f"such as {_DEFAULT_BETAS}"
        )
    if _is_number(eps):
        raise ValueError(
            f"got eps {eps!r}, expected two finite positive numbers: the first is added to squared "
            "gradients. Leave eps out, or write eps=(1e-30, 1e-16)"
        )
    if not (_numbers(eps, 2) and all(_SMALLEST < float(value) <= _LARGEST_EPS for value in eps)):
        raise ValueError(
            f"got eps {eps!r}, expected two finite positive numbers up to {_LARGEST_EPS} that are "
            "not 0 in float32, such as (1e-30, 1e-16)"
        )
    for value, beta in zip(eps, betas[1:], strict=True):
        if float(value) * (1.0 - float(beta)) < 2 * _SMALLEST:  # a statistic of zeros would be 0
            raise ValueError(
                f"got eps {eps!r} with betas {betas!r}, expected numbers that are not 0 in float32 "
                "when multiplied by 1 - beta2 and 1 - beta3, such as (1e-30, 1e-16)"
            )
    threshold, decay = group["clip_threshold"], group["weight_decay"]
    if not (_is_number(threshold) and float(threshold) > _SMALLEST):
        raise ValueError(
            f"got clip_threshold {threshold!r}, expected a positive number (inf: no clipping)"
        )
    if not (_is_number(decay) and 0.0 <= float(decay) <= _LARGEST):
        raise ValueError(f"got weight_decay {decay!r}, expected a number from 0 to {_LARGEST:g}")
    for name, allowed in CHOICES.items():
        value = group[name]
        if isinstance(value, (bool, float, Tensor)) or value not in allowed:
            raise ValueError(f"got {name} {value!r}, expected one of {allowed}")
    for name in _FLAGS:
        if not isinstance(group[name], bool):
            raise ValueError(f"got {name} {group[name]!r}, expected True or False")
    size, seed = group["min_8bit_size"], group["seed"]
    if not (_is_integer(size) and int(size) >= 0):
        raise ValueError(f"got min_8bit_size {size!r}, expected an integer >= 0")
    if not (_is_integer(seed) and 0 <= int(seed) < 2**63):
        raise ValueError(f"got seed {seed!r}, expected an integer in [0, 2**63)")
    stream = group["stream"]
    if stream is not None and not (_is_integer(stream) and 0 <= int(stream) < 2**32):
        raise ValueError(f"got stream {stream!r}, expected None or an integer in [0, 2**32)")


def warn_of_options(group: Mapping[str, Any]) -> None:
    """Warn of options that are allowed and hardly ever meant."""
    if float(group["eps"][0]) > _ADAM_EPS:
        warnings.warn(
            f"eps[0]={group['eps'][0]!r} is added to squared gradients; Adam's eps is not. The "
            "default is 1e-30",
            UserWarning,
            stacklevel=4,
        )


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
    elif _is_number(lr):
        value = float(lr)  # type: ignore[arg-type]
    else:
        raise ValueError(f"got lr {lr!r}, expected a number or a tensor with one element")
    if not 0.0 <= value <= _LARGEST:
        raise ValueError(f"got lr {lr!r}, expected a number from 0 to {_LARGEST:g}")


# Options are checked at every step, and abstract classes take long to ask.
def _is_number(value: object) -> bool:
    if type(value) is float or (type(value) is int and value.bit_length() < 64):
        return True
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _numbers(value: object, count: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == count and all(map(_is_number, value))


def _number(value: Any) -> Any:
    """Return the number that a string or a Decimal stands for; anything else as it is."""
    if isinstance(value, (str, Decimal)):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value) if isinstance(value, str) else float(value)
    return value


PARAM_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
GRAD_DTYPES = PARAM_DTYPES | {torch.float64}


def check_params(
    params: Iterable[object], present: Iterable[Tensor], group: Group, *, sharded: bool = True
) -> None:
    """Check the parameters of a new group.

    Args:
        params: tensors or ``(name, tensor)``; other things are left to the base class.
        present: every parameter that the optimizer has already.
        group: its options.
        sharded: whether the optimizer's store takes DTensors.

    Parameters that need no gradient are left alone: 4-bit weights beside adapters, for instance.

    Raises:
        TypeError: wrong dtype or layout, or a subclass that wraps other tensors.
        ValueError: a parameter is there twice, or elements share memory.
        NotImplementedError: a parameter is sharded in a way that cannot be updated.
    """
    present = list(present)
    known = {id(param) for param in present}
    seen: set[int] = set()
    looked_at: list[tuple[str, Tensor]] = []
    layouts: list[tuple[str, Layout]] = []
    for position, entry in enumerate(params):
        named = isinstance(entry, tuple) and len(entry) == 2
        param = entry[1] if named else entry  # type: ignore[index]
        if not isinstance(param, Tensor):
            continue
        shape = "not known yet" if is_lazy(param) else tuple(param.shape)
        name = f"{entry[0]!r}" if named else f"{position} of the group"  # type: ignore[index]
        what = f"parameter {name} (shape {shape})"
        if id(param) in known:
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
        if is_lazy(param) or not param.requires_grad:
            continue  # looked at when it has a shape, or a gradient
        layout = plan_state(param, group)
        if is_sharded(param):
            if not sharded:
                raise NotImplementedError(
                    f"{what} is a sharded {type(param).__name__}, whose state cannot be paged; use "
                    "is_paged=False, or fully_shard with CPUOffloadPolicy()"
                )
            try:
                check_shard(param, layout)
            except NotImplementedError as error:
                raise NotImplementedError(f"{what} {error}") from None
            param = local(param)
        if is_traceable_wrapper_subclass(param):
            raise TypeError(
                f"{what} is a {type(param).__name__}, which wraps other tensors; expected an "
                "ordinary tensor. Optimize the tensors that it wraps, or freeze it"
            )
        if param.layout != torch.strided or param.dtype not in PARAM_DTYPES:
            raise TypeError(
                f"{what} is {param.dtype} with layout {param.layout}, expected a dense tensor "
                "of torch.float32, torch.bfloat16 or torch.float16"
            )
        if elements_overlap(param):
            raise ValueError(
                f"{what} has strides {param.stride()}: several elements share memory, so it "
                "cannot be updated in place; use param.contiguous()"
            )
        looked_at.append((what, param))
        layouts.append((what, layout))
    pair = sharing([*(("a parameter of another group", p) for p in present), *looked_at])
    if pair is not None:
        raise ValueError(
            f"{pair[0]} and {pair[1]} share memory, so each would undo the other's update; tie "
            "weights by using one nn.Parameter in both places"
        )
    warn_of_large_vectors(layouts, group)


def usable(param: Tensor, grad: Tensor, shape: torch.Size) -> bool:
    """Return whether a step can use ``grad`` for ``param``, which has ``shape``."""
    if not (
        grad.dtype in GRAD_DTYPES
        and param.dtype in PARAM_DTYPES
        and grad.layout is torch.strided
        and grad.shape == shape
        and grad.device == param.device
    ):
        return False
    if type(param) in PLAIN and type(grad) in PLAIN:
        sizes = param.untyped_storage().nbytes(), grad.untyped_storage().nbytes()
        return 0 not in sizes or 0 in shape
    return _placements(grad) == _placements(param) and has_memory(param) and has_memory(grad)


def _placements(tensor: Any) -> Any:
    return tensor.placements if is_sharded(tensor) else None


def has_memory(tensor: Tensor) -> bool:
    """Return whether nobody has freed the storage, as tools do that swap parameters out."""
    tensor = local(tensor)
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def unusable_error(param: Tensor, grad: Tensor, position: int) -> Exception:
    """Return the error to raise where :func:`usable` says no."""
    for what, tensor in (("parameter", param), ("gradient", grad)):
        if tensor.layout == torch.strided and not has_memory(tensor):
            return ValueError(
                f"parameter {position} (shape {tuple(param.shape)}): the memory of the {what} has "
                "been freed; bring it back before the step"
            )
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
    """Return the error for a parameter whose state was made for another ``shape``."""
    if shape is None:
        return ValueError(
            f"the state of parameter {position} (shape {tuple(param.shape)}) is not complete: it "
            f"has {sorted(state)} and there is no page with the rest; use load_state_dict() to "
            "give an optimizer its state"
        )
    return ValueError(
        f"parameter {position} has shape {tuple(param.shape)}, its state was made for shape "
        f"{tuple(shape)}; make a new optimizer after changing the shape of a parameter"
    )


def check_alone(groups: Iterable[Group]) -> None:
    """Refuse a step in backward where gradients come together only after autograd has made them."""
    if any(is_sharded(param) for group in groups for param in group["params"]):
        raise RuntimeError(
            "step_in_backward waits for gradients that autograd accumulates, and fully_shard sets "
            "those of its parameters itself. Use ordinary steps"
        )
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    size = distributed.get_world_size() if together else 1
    if size > 1:
        raise RuntimeError(
            f"step_in_backward updates a parameter before the gradients of the {size} processes "
            "have been averaged, so their models would drift apart. Use ordinary steps with "
            "DistributedDataParallel, or one process"
        )
