"""What a gradient that has been used leaves in ``param.grad``, and what it says to who needs it.

A tensor without memory, :class:`ReleasedGradient`.  With ``None`` there, ``clip_grad_norm_`` would
find a norm of 0, and a second backward pass would become a second update.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SECOND = (
    "a parameter got a second gradient before optimizer.step(), but with step_in_backward the "
    "first one has been used and freed: to the optimizer they would be two steps. "
    "Call optimizer.step() after each backward(); to add up the gradients of several backward "
    "passes, run all but the last inside `with release.accumulate():`. A backward() whose "
    "gradients are meant to be thrown away, as those that a generator's loss leaves in its "
    "discriminator, updates, too, and zero_grad() comes too late: run it inside "
    "`with release.accumulate():`, then zero_grad(), or freeze the parameters meanwhile. If this "
    "was a single backward(), the parameter is used in several segments of reentrant "
    "checkpointing, which is a backward pass each: use checkpoint(..., use_reentrant=False). The "
    "parameter holds the update of the first gradient; where that is not wanted, return to a "
    "checkpoint"
)
_GONE = (
    "step_in_backward has used and freed this gradient during backward(); {what} has nothing to "
    "work on. The parameters hold this update already, by the gradients as they came, neither "
    "clipped nor unscaled: step() ends the step; where the update is not wanted, return to a "
    "checkpoint. Global-norm clipping: use CAME's own clip_threshold, which limits the RMS of each "
    "tensor's update (on by default), in place of clip_grad_norm_. GradScaler: train in bfloat16, "
    "which needs none. To have the gradients all the same, run every backward() of the step inside "
    "`with release.accumulate():`; they then exist all at once"
)
_READ_IN_BACKWARD = (
    "step_in_backward has used and freed this gradient, and something in the same backward() reads "
    "it afterwards ({what}). DistributedDataParallel does that, with one process, too: leave it "
    "away there, and use ordinary steps with several processes. So does a hook that was registered "
    "after step_in_backward was called: register it before. To have the gradients all the same, "
    "run every backward() of the step inside `with release.accumulate():`; they then exist all at "
    "once. Parameters whose gradients were ready by now hold their update: zero_grad() and step() "
    "end this step; where a part of it is not wanted, return to a checkpoint"
)

_aten = torch.ops.aten


class ReleasedGradient(Tensor):
    """What is left in ``param.grad`` of a gradient that has been used: no memory, no values.

    Shape, dtype and device are the gradient's.  Setting it to zero does nothing; every other
    operation raises :class:`RuntimeError`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, grad: Tensor) -> ReleasedGradient:
        """Stand in for ``grad``."""
        made: ReleasedGradient = Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=(0,) * grad.dim(), dtype=grad.dtype, device=grad.device
        )
        return made

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """0, for those who count."""
        return 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # zero_grad(set_to_none=False): there is nothing left that could be added to.
        if func is _aten.zero_.default:
            return args[0]
        if func is _aten._foreach_zero_.default:
            return _zero_others(args[0])
        in_backward = torch._C._current_graph_task_id() != -1
        # How autograd adds to a gradient that is there, the second one with create_graph=True.
        if func is _aten.add_.Tensor or (in_backward and func is _aten.add.Tensor):
            raise RuntimeError(SECOND)
        raise RuntimeError((_READ_IN_BACKWARD if in_backward else _GONE).format(what=func))


def _zero_others(grads: Iterable[Tensor]) -> None:
    for grad in grads:
        if type(grad) is not ReleasedGradient:
            grad.zero_()
