"""The options of a parameter group: their names, their allowed values, and the check of both.

The check runs when a group is added, when one is loaded, and at every step, because schedulers and
users write into ``param_groups`` as they like.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from .state.layout import FACTORED_VIEWS, OPTIM_BITS
from .state.paged import Placement

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
_FLAGS = ("cautious", "maximize", "bias_correction")

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


def check_paging(is_paged: object, page_dir: object, page_budget: object) -> Placement | None:
    """Where pages go, or ``None`` if state is not paged; these are no options of groups.

    Raises:
        ValueError: one of the three is wrong, or has no effect.
    """
    if not isinstance(is_paged, bool):
        raise ValueError(f"got is_paged {is_paged!r}, expected True or False")
    if not is_paged:
        if page_dir is not None or page_budget is not None:
            raise ValueError(
                f"got page_dir {page_dir!r} and page_budget {page_budget!r} without is_paged=True"
            )
        return None
    directory = None
    if page_dir is not None:
        if not isinstance(page_dir, (str, os.PathLike)):
            raise ValueError(f"got page_dir {page_dir!r}, expected the path of a directory")
        directory = Path(page_dir).expanduser().absolute()
        if not directory.is_dir():
            raise ValueError(
                f"got page_dir {str(page_dir)!r}, which is no directory; make it first"
            )
    if page_budget is not None:
        if isinstance(page_budget, bool) or not isinstance(page_budget, Integral):
            raise ValueError(f"got page_budget {page_budget!r}, expected a number of bytes")
        if page_budget <= 0:
            raise ValueError(f"got page_budget {page_budget}, expected a number of bytes > 0")
        page_budget = int(page_budget)
    return Placement(directory, page_budget)


def _numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(number, Real) for number in value)
    )
