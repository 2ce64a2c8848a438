"""Step in backward: each parameter is updated, and its gradient freed, as soon as it is ready.

After an ordinary backward pass all gradients exist at once. Here a hook on every parameter hands
the gradient to the optimizer when autograd has finished it, and frees it, so that only the one in
hand exists. ``docs/step_in_backward.md`` says what this means for a training loop.

Four things are kept in order:

* **What is taken for what.**  A gradient that has been used leaves a :class:`ReleasedGradient` in
  ``param.grad`` until ``optimizer.step()``: a tensor without memory that raises when it is read or
  added to.
* **Streams.**  Autograd runs a hook on the stream on which it has accumulated the gradient, after
  everything that read the parameter has been queued. So the update goes to the current stream of
  the hook, and ``backward()`` lets its caller's stream wait for it at the end. The gradient may
  have been allocated on another stream, the one of the operation that made it; ``record_stream``
  keeps its memory from being given away before the update has read it.
* **Refusals.**  Before the first update of a step, everything is checked that does not depend on
  gradients still to come: options, and the pages of all parameters. What fails later has to say
  how far the step has come.
* **References.**  Autograd keeps hooks where Python's garbage collector cannot look. A hook that
  held the optimizer would keep it, and the model, for good; so it holds a weak reference.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import REFUSALS, explain
from .optim import CAME
from .validation import check_alone, check_options

_PAGE = "docs/step_in_backward.md"
SECOND = (
    "got a second gradient before optimizer.step(), but step_in_backward has already applied the "
    "first. Call step() after each backward(); to add gradients up, run all but the last inside "
    "`with release.accumulate():`, as also passes whose gradients are meant to be discarded, and "
    f"checkpoint with use_reentrant=False ({_PAGE}#accumulation)"
)
_GONE = (
    "{what} cannot be used: step_in_backward has already applied and freed this gradient, neither "
    "clipped nor unscaled. Use clip_threshold in place of clip_grad_norm_ and bfloat16 in place of "
    "a GradScaler, or keep the gradients: run every backward() of the step inside "
    f"`with release.accumulate():` ({_PAGE}#clipping-and-gradscaler)"
)
_READ_IN_BACKWARD = (
    "{what} in backward() reads a gradient that step_in_backward has already applied and freed. "
    "Do not wrap the model in DistributedDataParallel for single-process runs and register hooks "
    "on gradients before step_in_backward, or run every backward() of the step inside "
    f"`with release.accumulate():` ({_PAGE}#several-processes)"
)

_aten = torch.ops.aten


class ReleasedGradient(Tensor):
    """What is left in ``param.grad`` of a gradient that has been used: no memory, no values.

    Shape, dtype and device are the gradient's. Its 2-norm is known, so that ``clip_grad_norm_``
    measures where it has nothing to clip. Setting it to zero and multiplying it by 1 do nothing;
    every other operation raises :class:`RuntimeError`.
    """

    _square: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, grad: Tensor, square: Tensor | None) -> ReleasedGradient:
        """Stand in for ``grad``, whose sum of squares is ``square``, or 0."""
        made: ReleasedGradient = Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=(0,) * grad.dim(), dtype=grad.dtype, device=grad.device
        )
        made._square = grad.new_zeros(1, dtype=torch.float32) if square is None else square
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
        if not in_backward:
            if func is _aten.linalg_vector_norm.default and (*args, 2)[1] == 2 and len(args) < 3:
                return args[0]._square.reshape(()).sqrt()
            # Clipping to a norm that is not exceeded. Reading the factor waits for the device.
            if func in (_aten.mul_.Tensor, _aten.mul_.Scalar) and float(args[1]) == 1:
                return args[0]
        # How autograd adds to a gradient that is there, the second one with create_graph=True.
        if func is _aten.add_.Tensor or (in_backward and func is _aten.add.Tensor):
            raise RuntimeError(f"a parameter {SECOND}")
        raise RuntimeError((_READ_IN_BACKWARD if in_backward else _GONE).format(what=func))


def _zero_others(grads: Iterable[Tensor]) -> None:
    for grad in grads:
        if type(grad) is not ReleasedGradient:
            grad.zero_()


def step_in_backward(optimizer: Optimizer) -> GradientRelease:
    """Let ``loss.backward()`` update every parameter as soon as its gradient is ready.

    The training loop stays as it is; ``optimizer.step()`` is still called after each backward pass,
    and ends the step. The results are those of ordinary stepping, to the last bit::

        release = came8bit.step_in_backward(optimizer)
        for batch in batches:
            model(batch).backward()
            optimizer.step()
            scheduler.step()

    Args:
        optimizer: one of this package's, or a wrapper that has one as its ``optimizer``, such as
            accelerate's. Groups may be added and parameters (un)frozen later.

    Returns:
        A handle with ``remove()``, ``accumulate()`` and ``grad_norm()``. As a context manager it
        removes itself. The optimizer keeps it; it does not keep the optimizer.

    Raises:
        TypeError: ``optimizer`` is not one of this package's.
        ValueError: it steps in backward already.
        RuntimeError: several processes train together, or the wrapper scales gradients.
    """
    inner: Any = optimizer
    # Some wrappers are subclasses of what they wrap (Lightning, Fabric): look inside first.
    while isinstance(getattr(inner, "optimizer", None), Optimizer) or not isinstance(inner, CAME):
        scaler = getattr(inner, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise RuntimeError(
                "step_in_backward cannot be used with a GradScaler: whether a step is to be left "
                "out is known after backward() only. Use mixed_precision='bf16', which needs none"
            )
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"got {type(inner).__name__}, expected one of came8bit's optimizers, or a wrapper "
                "that has one as its attribute `optimizer`"
            )
        inner = inner.optimizer
    if inner._release is not None:
        raise ValueError(
            "this optimizer steps in backward already; use the handle of the first call, or "
            "remove() it first"
        )
    check_alone(inner.param_groups)
    inner._release = release = GradientRelease(inner)
    return release


class GradientRelease:
    """Handle of :func:`step_in_backward`."""

    def __init__(self, optimizer: CAME) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooks: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        # Backward of several devices runs in as many threads.
        self._lock = threading.Lock()
        self._accumulating = 0
        self._forget_step()
        self.attach(optimizer)

    def _forget_step(self) -> None:
        # Parameters that this step has updated, by position, in the order of backward.
        self._updated: dict[int, Tensor] = {}
        self._checked = False  # options and pages
        # id of a parameter -> its group's index and its position; empty between two steps.
        self._places: dict[int, tuple[int, int]] = {}
        self._groups: list[dict[str, Any]] = []
        self._group_count = 0

    # --- for users --------------------------------------------------------------------------------

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks; the optimizer then updates in ``step()`` again. Idempotent."""
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None
            _drop_gradients(optimizer, ReleasedGradient)
            optimizer._store.flush()
            optimizer._store.set_prefetch_order([])
        self._forget_step()

    def grad_norm(self) -> Tensor:
        """Return the 2-norm of the gradients of the last step; see :meth:`CAME.grad_norm`."""
        optimizer = self._optimizer()
        return torch.zeros(()) if optimizer is None else optimizer.grad_norm()

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """Let gradients add up in the backward passes inside, and update nothing.

        The first backward pass outside updates each parameter with the sum, ``optimizer.step()``
        those that this pass does not reach. Gradients exist all at once meanwhile.

        Args:
            enabled: ``False`` for a context without effect, as for the last of several passes.
        """
        self._accumulating += enabled
        try:
            yield
        finally:
            self._accumulating -= enabled

    # --- for the optimizer ------------------------------------------------------------------------

    def finish_step(self, closure: Callable[[], Any] | None) -> Any:
        """Update what still has a gradient and end the step, as ``optimizer.step()`` does.

        Args:
            closure: evaluates the model; its ``backward()`` updates parameters.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError, TypeError, FloatingPointError, OSError, MemoryError: as in ordinary steps.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _drop_gradients(optimizer, ReleasedGradient)
        count = len(self._updated)
        if not count:
            optimizer._squares.clear()
        optimizer._update_all(
            f"backward() has updated {count} of {len(self._places)} parameters, the others "
            "have not been changed. zero_grad() and step() end this step"
            if count
            else "Nothing has been changed"
        )
        _drop_gradients(optimizer)
        if self._updated:
            optimizer._store.set_prefetch_order(list(self._updated.values()))
        self._forget_step()
        self.attach(optimizer)
        return loss

    def abandon_step(self) -> None:
        """End the step without another update, if one is under way; its gradients go."""
        optimizer = self._optimizer()
        if optimizer is not None and self._places:
            _drop_gradients(optimizer)
            self._forget_step()

    def attach(self, optimizer: CAME) -> None:
        """Attach a hook to every parameter that has none yet, and drop those that have left."""
        this = weakref.ref(self)

        @_disable_dynamo
        def hook(param: Tensor) -> None:
            release = this()
            if release is not None:
                release._on_gradient(param)

        present = set()
        for group in optimizer.param_groups:
            for param in group["params"]:
                present.add(id(param))
                known = self._hooks.get(id(param))
                if is_lazy(param) or not param.is_floating_point():
                    continue  # cannot have a gradient, or not yet
                if known is None or known[0]() is not param:
                    # Autograd takes no hook for a frozen parameter, but keeps one while it is.
                    needs_gradient = param.requires_grad
                    handle = param.requires_grad_().register_post_accumulate_grad_hook(hook)
                    param.requires_grad_(needs_gradient)
                    self._hooks[id(param)] = weakref.ref(param), handle
        for key in self._hooks.keys() - present:
            self._hooks.pop(key)[1].remove()

    # --- in backward ------------------------------------------------------------------------------

    def _begin_step(self, optimizer: CAME) -> None:
        """Note places, once per step and where groups have changed."""
        check_alone(optimizer.param_groups)
        if self._groups is not optimizer.param_groups:  # the first time, or after loading
            self._forget_step()
        self.attach(optimizer)
        groups = enumerate(optimizer.param_groups)
        members = [(index, param) for index, group in groups for param in group["params"]]
        self._places |= {id(p): (index, place) for place, (index, p) in enumerate(members)}
        self._groups, self._group_count = optimizer.param_groups, len(optimizer.param_groups)
        self._checked = False

    def _on_gradient(self, param: Tensor) -> None:
        """Update ``param``, whose gradient is complete, and free the gradient."""
        optimizer, grad = self._optimizer(), param.grad
        if optimizer is None or grad is None:
            return
        with self._lock:
            groups = optimizer.param_groups
            if self._groups is not groups or self._group_count != len(groups):
                self._begin_step(optimizer)
            place = self._places.get(id(param))
            if place is None:  # taken out of the optimizer
                return
            index, position = place
            if position in self._updated:
                raise RuntimeError(f"parameter {position} {SECOND}")
            if self._accumulating:
                return
            if type(grad) is ReleasedGradient:
                raise RuntimeError(
                    f"parameter {position}: another optimizer that steps in backward has used and "
                    "freed its gradient; let one of them have the parameter"
                )
            if grad.requires_grad:
                raise RuntimeError(
                    f"parameter {position}: backward(create_graph=True) is for gradients that are "
                    "differentiated later, but step_in_backward frees them; use "
                    "torch.autograd.grad, or remove() the handle of step_in_backward first"
                )
            if not self._updated:
                optimizer._squares.clear()
            with self._saying_how_far():
                self._update(optimizer, index, param, position)
            if grad.is_cuda:
                grad.record_stream(torch.cuda.current_stream(grad.device))
            param.grad = ReleasedGradient(grad, optimizer._squares.get(position))
            self._updated[position] = param

    def _update(self, optimizer: CAME, index: int, param: Tensor, position: int) -> None:
        if not self._checked:
            for group in optimizer.param_groups:
                check_options(group)
            optimizer._store.check(optimizer.param_groups)
            self._checked = True
        optimizer._update_one(optimizer.param_groups[index], param, position)

    @contextmanager
    def _saying_how_far(self) -> Iterator[None]:
        """Let errors in backward() say what this step has changed, and how to go on."""
        try:
            yield
        except REFUSALS as error:
            count = len(self._updated)
            explain(
                error,
                f"This happened in backward(), after {count} of {len(self._places)} parameters had "
                "been updated; the others have not been. zero_grad() and step() end this step; "
                "where a part of it is not wanted, return to a checkpoint of model and optimizer"
                if count
                else "This happened in backward(), before the first update of this step: no "
                "parameter has been changed. zero_grad() and step() end this step",
            )
            raise


def _drop_gradients(optimizer: CAME, kind: type[Tensor] = Tensor) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param.grad, kind):
                param.grad = None
