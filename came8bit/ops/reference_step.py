"""Steps that the compiled kernels cannot take yet; the reference takes them, on every device.

The rule gets its options in the reference first. An option that is listed here never reaches a
kernel, which would not know it: the step is right, many times slower, and warned of once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

from .. import reference
from ..state.layout import Group
from ..state.store import StepItem

_warned: set[str] = set()


def needs_reference(group: Group) -> str | None:
    """Return the option of ``group`` that no kernel has, or None."""
    return "nesterov=True" if group["nesterov"] else None


def reference_step(group: Group, members: Iterable[StepItem], option: str) -> None:
    """Update ``members``, whose state is complete, by the reference; ``option`` is why."""
    if option not in _warned:
        _warned.add(option)
        warnings.warn(
            f"came8bit's compiled kernels do not have {option} yet: the reference implementation "
            "runs instead, with the same rule and many times slower",
            RuntimeWarning,
            stacklevel=2,
        )
    hyper = _hyper(group)
    for param, grad, state, position in members:
        factored = "exp_avg_sq_row" in state
        step = reference.factored_step_ if factored else reference.unfactored_step_
        buffers = {"absmax": None, **state}
        step(param, grad, **buffers, index=position, offset=0, hyper=hyper)


def _hyper(group: Group) -> reference.Hyper:
    lr = group["lr"]
    beta1, beta2, beta3 = map(float, group["betas"])
    eps1, eps2 = map(float, group["eps"])
    return reference.Hyper(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        eps1=eps1,
        eps2=eps2,
        clip_threshold=float(group["clip_threshold"]),
        lr=0.0 if isinstance(lr, Tensor) else float(lr),
        weight_decay=float(group["weight_decay"]),
        lr_tensor=lr.detach().reshape(()) if isinstance(lr, Tensor) else None,
        stochastic=group["rounding"] == "stochastic",
        propagate=group["nonfinite"] == "propagate",
        **{name: bool(group[name]) for name in ("cautious", "maximize", "bias_correction")},
        nesterov=group["nesterov"],
        seed=int(group["seed"]),
    )
