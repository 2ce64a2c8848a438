"""The optimizer classes.

Groups, checks, lazily made state and the step loop; the arithmetic is behind two operators in
:mod:`came8bit._ops`, and ``docs/algorithm.md`` writes it out.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import _ops
from .checks import Work, check_finite, check_params, moved_error, unusable_error, usable
from .loading import Group, plan_state, read_state_dict
from .options import DEFAULT_SEED, FORMAT_VERSION, check_options
from .quant import slice_shape
from .state import dense
from .state.layout import DEFAULT_MIN_8BIT_SIZE

__all__ = ["CAME", "CAME8bit", "CAME32bit", "PagedCAME", "PagedCAME8bit", "PagedCAME32bit"]

_LOOK_EVERY = 16  # steps between two looks at the skip counters

_FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "rms_ratio")
_UNFACTORED = ("exp_avg_sq",)
_COUNTERS = ("step", "skipped")
# (factored, coded) -> the state tensors in the order of the operator's arguments
_COLUMNS = {
    (True, True): itemgetter("exp_avg", "absmax", *_FACTORED, *_COUNTERS),
    (True, False): itemgetter("exp_avg", *_FACTORED, *_COUNTERS),
    (False, True): itemgetter("exp_avg", "absmax", *_UNFACTORED, *_COUNTERS),
    (False, False): itemgetter("exp_avg", *_UNFACTORED, *_COUNTERS),
}


class _Bucket:
    """Arguments of one operator call: parameters of one kind on one device."""

    __slots__ = ("grads", "params", "states", "views")

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.views: list[int] = []


class CAME(Optimizer):
    r"""CAME: confidence-guided adaptive memory-efficient optimization (arXiv 2307.02047).

    A parameter is seen as a batch of :math:`n \times k` matrices with gradient :math:`G`; all state
    starts at zero, all arithmetic is fp32:

    .. math::
        \begin{aligned}
        &r \leftarrow \beta_2 r + (1-\beta_2)\,\mathrm{mean}_j(G^2+\epsilon_1) \qquad
         c \leftarrow \beta_2 c + (1-\beta_2)\,\mathrm{mean}_i(G^2+\epsilon_1) \\
        &U = G \sqrt{\mathrm{mean}(r)/r_i}\,/\sqrt{c_j} \qquad
         \hat U = U / \max(1, \mathrm{RMS}(U)/d) \\
        &M \leftarrow \beta_1 M + (1-\beta_1) \hat U \qquad
         S = (\hat U - M)^2 + \epsilon_2 \\
        &R \leftarrow \beta_3 R + (1-\beta_3)\,\mathrm{mean}_j(S) \qquad
         C \leftarrow \beta_3 C + (1-\beta_3)\,\mathrm{mean}_i(S) \\
        &p \leftarrow p - \gamma\lambda p - \gamma M \sqrt{\mathrm{mean}(R)/R_i}\,/\sqrt{C_j}
        \end{aligned}

    Parameters with fewer than two dimensions keep a full second moment :math:`v` in place of
    :math:`r, c`, and have no confidence term: :math:`p \leftarrow p - \gamma\lambda p - \gamma M`.

    **Learning rate.** There is no bias correction, here as in the paper, and the last division
    amplifies early updates: with the default betas the first update has an RMS of about 11 times
    ``lr``, the hundredth 2.5 times, the thousandth 0.8 times.  So warm-up is load-bearing, and a
    good ``lr`` is about a tenth of AdamW's.  ``bias_correction=True`` removes the effect; then
    AdamW's ``lr`` is the place to start.

    Where this differs from the authors' code (``came-pytorch``), and why (``docs/algorithm.md``):

    * *Convolutions are factored as* ``(out, in*kh*kw)``, *narrow matrices not at all*: the view
      with the fewest bytes is taken.  A 3x3 convolution factored over its last two dimensions
      stores more than Adam does.  ``factored_view="last_two"`` gives the official choice.
    * *The instability is summed around an expected clip scale*, so that three sweeps over the
      gradient suffice and no temporary of the parameter's size is needed.  Mathematically nothing
      changes.
    * *Weight decay and update are subtracted together and rounded once*; bf16 and fp16 parameters
      are rounded stochastically, or updates below half a unit in the last place would be lost.
    * *A gradient that is not finite is skipped* rather than poisoning the state for good.
    * *Loading keeps every dtype*: statistics stay fp32 when parameters are bf16.

    Args:
        params: parameters or dicts of parameter groups, or ``named_parameters()``.  fp32, bf16 or
            fp16, any strides.  Every option below can be set per group.
        lr: learning rate :math:`\gamma`, a number or a tensor with one element.  A tensor is
            rounded to fp32 and read where it is used, so changing it in place works; put it on the
            parameters' device or the CPU.
        betas: decay of momentum, second moment and instability.
        eps: added to the squared gradient and to the instability.
        clip_threshold: largest RMS :math:`d` of the preconditioned gradient of a parameter;
            ``math.inf`` turns clipping off.
        weight_decay: decoupled weight decay :math:`\lambda`.
        optim_bits: 32, or 8 for momentum in blockwise 8-bit codes (see :class:`CAME8bit`).
        is_paged: not available yet.
        min_8bit_size: parameters with fewer elements keep fp32 momentum; so do those with fewer
            than two dimensions and those that codes would not make smaller.  Read, like
            ``optim_bits`` and ``factored_view``, when the state of a parameter is made.
        rounding: ``"stochastic"`` or ``"nearest"``, of bf16 and fp16 parameters.
        cautious: drop the elements of an update whose sign disagrees with the gradient, and scale
            the others up (arXiv 2411.16085).
        nonfinite: what to do where the fp32 sum of squares of a gradient is not finite.
            ``"skip"`` leaves that parameter and its state alone and counts (:meth:`skipped_steps`).
            ``"raise"`` looks at all gradients before anything changes and raises
            :class:`FloatingPointError`; it waits for the device twice per step.
            ``"propagate"`` computes with what is there.
        maximize: ascend instead of descend.
        bias_correction: divide the moments by ``1 - beta**step``.
        factored_view: ``"smallest"`` or ``"last_two"``.
        seed: of the stochastic rounding.  The bits depend on it, the parameter's position, its
            step and the element only: equal on every device and replica, and after resuming.

    Raises:
        ValueError, TypeError: an option or parameter is not usable; the message names it.
        NotImplementedError: ``is_paged=True``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 32,
        is_paged: bool = False,
        min_8bit_size: int = DEFAULT_MIN_8BIT_SIZE,
        rounding: str = "stochastic",
        cautious: bool = False,
        nonfinite: str = "skip",
        maximize: bool = False,
        bias_correction: bool = False,
        factored_view: str = "smallest",
        seed: int = DEFAULT_SEED,
    ) -> None:
        if is_paged:
            raise NotImplementedError(
                f"{type(self).__name__}: paged state is not available yet; use "
                f"CAME{8 if optim_bits == 8 else 32}bit, whose state stays on the device"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "cautious": cautious,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "bias_correction": bias_correction,
            "factored_view": factored_view,
            "seed": seed,
            "format_version": FORMAT_VERSION,
        }
        check_options(defaults)
        self._reset_warnings()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The base class adds an option that this optimizer does not have.
        self.defaults.pop("differentiable", None)
        self._reset_warnings()

    def _reset_warnings(self) -> None:
        self._steps_until_look = _LOOK_EVERY
        self._warn_from = 1

    # --- groups -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the constructor's.

        Raises:
            ValueError, TypeError: an option or a parameter is not usable.  The optimizer is then
                as it was.
        """
        if isinstance(param_group, dict):
            params = param_group.get("params", [])
            check_options({**self.defaults, **param_group})
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
            present = {id(param) for group in self.param_groups for param in group["params"]}
            check_params([params] if isinstance(params, Tensor) else params, present)
        super().add_param_group(param_group)

    # --- step -------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError, TypeError: an option or a gradient is not usable; nothing has changed.
            FloatingPointError: ``nonfinite="raise"`` and a gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._run(self._collect())
        return loss

    def _collect(self) -> list[tuple[Group, list[Work]]]:
        """Everything there is to do, checked before anything changes."""
        work: list[tuple[Group, list[Work]]] = []
        first = 0
        for group in self.param_groups:
            check_options(group)
            items = (self._work_item(p, i) for i, p in enumerate(group["params"], first))
            work.append((group, [item for item in items if item is not None]))
            first += len(group["params"])
        return work

    def _work_item(self, param: Tensor, position: int) -> Work | None:
        """What a step needs of one parameter, checked; ``None`` where there is nothing to do."""
        grad = param.grad
        if grad is None:
            return None
        if not usable(param, grad):
            raise unusable_error(param, grad, position)
        state = self.state.get(param) or {}
        if state and (
            state["exp_avg"].shape != param.shape or state["step"].device != param.device
        ):
            raise moved_error(param, state, position)
        if not param.numel():
            return None
        if grad.dtype == torch.float64:
            grad = grad.to(torch.float32)
        return Work(param, grad, state, position)

    def _run(self, work: list[tuple[Group, list[Work]]]) -> None:
        """Update the parameters in ``work``."""
        for group, members in work:
            if group["nonfinite"] == "raise":
                check_finite(members)
        self._make_missing_state(work)
        for group, members in work:
            self._step_group(group, members)
        self._warn_if_skipped(work)

    def _make_missing_state(self, work: list[tuple[Group, list[Work]]]) -> None:
        """Fill the empty states in ``work``; only then put them into ``self.state``."""
        fresh = [(item, group) for group, members in work for item in members if not item.state]
        for item, _ in fresh:
            if item.param.is_meta or hasattr(item.param, "placements"):
                raise NotImplementedError(
                    f"parameter {item.position} is a {type(item.param).__name__} on "
                    f"{item.param.device}; meta and sharded (DTensor) parameters are not supported"
                )
        for item, group in fresh:
            item.state.update(dense.allocate(plan_state(item.param, group), item.param.device))
        for item, _ in fresh:
            self.state[item.param] = item.state

    def _step_group(self, group: Group, members: list[Work]) -> None:
        """One operator call per kind of parameter and device."""
        buckets: defaultdict[tuple[torch.device, bool, bool], _Bucket] = defaultdict(_Bucket)
        for param, grad, state, position in members:
            row = state.get("exp_avg_sq_row")
            bucket = buckets[param.device, row is not None, "absmax" in state]
            bucket.params.append(param)
            bucket.grads.append(grad)
            bucket.states.append(state)
            if row is None:
                bucket.views += (1, *slice_shape(param.shape), position, 0)
            else:
                bucket.views += (*row.shape, state["exp_avg_sq_col"].shape[1], position, 0)
        lr = group["lr"]
        tensor_lr = lr.detach().reshape(()) if isinstance(lr, Tensor) else None
        hyper = [
            *map(float, (*group["betas"], *group["eps"], group["clip_threshold"])),
            float(lr) if tensor_lr is None else 0.0,
            float(group["weight_decay"]),
        ]
        options = [
            int(group["rounding"] == "stochastic"),
            int(group["cautious"]),
            int(group["nonfinite"] == "propagate"),
            int(group["maximize"]),
            int(group["bias_correction"]),
            int(group["seed"]),
        ]
        for (device, factored, coded), bucket in buckets.items():
            columns = [
                list(column)
                for column in zip(*map(_COLUMNS[factored, coded], bucket.states), strict=True)
            ]
            if not coded:
                columns.insert(1, [])
            if tensor_lr is not None:
                tensor_lr = tensor_lr.to(device, torch.float32, non_blocking=True)
            operator = _ops.factored_step_ if factored else _ops.unfactored_step_
            before = _total(columns[-1]) if group["nonfinite"] == "raise" else None
            operator(bucket.params, bucket.grads, *columns, bucket.views, tensor_lr, hyper, options)
            # A kernel writes past autograd: a graph that still needs the old values has to notice.
            torch.autograd.graph.increment_version(bucket.params)
            if before is not None and int(_total(columns[-1]) - before):
                raise FloatingPointError(
                    "the preconditioned gradient of a parameter is not finite although its "
                    "gradient is; that parameter was left alone, others have been updated. Lower "
                    "the loss scale or clip gradients"
                )

    # --- what was skipped -------------------------------------------------------------------------

    def skipped_steps(self) -> int:
        """Updates of single parameters left out so far because of a gradient that is not finite.

        Waits for the device.
        """
        return sum(int(state["skipped"]) for state in self.state.values() if "skipped" in state)

    def _warn_if_skipped(self, work: list[tuple[Group, list[Work]]]) -> None:
        """Warn late, at 1, 10, 100, ... skipped updates, and only about counters in CPU memory.

        Reading a counter on an accelerator would wait for it; there, ask :meth:`skipped_steps`.
        """
        self._steps_until_look -= 1
        if self._steps_until_look > 0:
            return
        self._steps_until_look = _LOOK_EVERY
        states = [item.state for _, members in work for item in members]
        counters = [s["skipped"] for s in states if s["skipped"].device.type == "cpu"]
        total = int(_total(counters)) if counters else 0
        if total < self._warn_from:
            return
        while self._warn_from <= total:
            self._warn_from *= 10
        warnings.warn(
            f"{type(self).__name__}: {total} updates of single parameters have been skipped so far "
            "because the gradient was not finite; see skipped_steps() and the option nonfinite",
            RuntimeWarning,
            stacklevel=5,
        )

    # --- state of one parameter -------------------------------------------------------------------

    def _read_state(self, param: Tensor) -> dict[str, Tensor]:
        """The complete state of ``param``, empty before its first step; not to be written to."""
        return self.state.get(param) or {}

    def _write_state(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Replace the state of ``param`` by tensors on its device that nobody else uses."""
        self.state[param] = state

    # --- saving and loading -----------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned; nothing is shared with ``state_dict``.

        Tensors keep their dtype and move to their parameter's device.  The options come from
        ``state_dict``; those that it lacks stay as they are.  Hooks run as in
        :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: the state belongs to another optimizer, a newer version or other
                parameters.  The optimizer is then as it was.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups, state = read_state_dict(state_dict, self.param_groups)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _total(counters: list[Tensor]) -> Tensor:
    return torch.stack(counters).sum()


class _FixedCAME(CAME):
    """CAME with ``optim_bits`` and ``is_paged`` settled by the class."""

    _optim_bits: int
    _is_paged = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = DEFAULT_MIN_8BIT_SIZE,
        rounding: str = "stochastic",
        cautious: bool = False,
        nonfinite: str = "skip",
        maximize: bool = False,
        bias_correction: bool = False,
        factored_view: str = "smallest",
        seed: int = DEFAULT_SEED,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            clip_threshold,
            weight_decay,
            optim_bits=self._optim_bits,
            is_paged=self._is_paged,
            min_8bit_size=min_8bit_size,
            rounding=rounding,
            cautious=cautious,
            nonfinite=nonfinite,
            maximize=maximize,
            bias_correction=bias_correction,
            factored_view=factored_view,
            seed=seed,
        )


class CAME32bit(_FixedCAME):
    """:class:`CAME` with fp32 momentum, about 4.01 bytes of state per parameter."""

    _optim_bits = 32


class CAME8bit(_FixedCAME):
    """:class:`CAME` with momentum in 8 bits, about 1.02 bytes of state per parameter.

    Momentum is kept in signed square-root codes, scaled by the largest magnitude of a block of 256
    values that never crosses a slice of the first dimension (:mod:`came8bit.quant`).  A zero stays
    exactly zero, and the momentum of an element whose gradient has stopped decays to zero.  The
    factored statistics stay fp32: they change by 0.1 % and 0.01 % a step, which 8 bits cannot hold.
    The update of a step uses the momentum before it is coded.

    Arguments are those of :class:`CAME` without ``optim_bits`` and ``is_paged``.  A parameter group
    may still set ``optim_bits`` to 32, for instance for embeddings.
    """

    _optim_bits = 8


class PagedCAME(_FixedCAME):
    """:class:`CAME32bit` with paged state; raises NotImplementedError until that exists."""

    _optim_bits = 32
    _is_paged = True


class PagedCAME32bit(PagedCAME):
    """The same as :class:`PagedCAME`."""


class PagedCAME8bit(_FixedCAME):
    """:class:`CAME8bit` with paged state; raises NotImplementedError until that exists."""

    _optim_bits = 8
    _is_paged = True
