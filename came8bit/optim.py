"""The optimizer.

Groups, checks, lazily made state and the step loop; the arithmetic is behind two operators in
:mod:`came8bit.ops`, and ``docs/internals/algorithm.md`` writes it out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy

from .errors import OUTSIDE, explaining
from .misfit import blaming_state
from .ops.sharded import moving, step_work
from .ops.step import (
    CaptureWarning,
    SkipWarning,
    check_finite,
    collect,
    collect_one,
    count_skipped,
)
from .overlap import check_apart
from .paging import store_for
from .param_groups import GlobalOptimManager
from .state.layout import DEFAULT_MIN_8BIT_SIZE, Group
from .state.store import StepItem, may_train
from .state_dict import StoredOptimizer
from .validation import (
    DEFAULT_SEED,
    FORMAT_VERSION,
    check_foreign,
    check_options,
    check_params,
    normalized,
    warn_of_options,
)

_UNCHANGED = "Nothing has been changed"


class CAME(StoredOptimizer):
    """CAME: confidence-guided adaptive memory-efficient optimization (arXiv 2307.02047).

    A parameter is seen as a batch of matrices. With gradient ``G``, all state zero at first and all
    arithmetic in fp32, a step is::

        r <- beta2*r + (1-beta2)*mean_j(G**2 + eps1)     (rows; c likewise for columns)
        U <- G * sqrt(mean(r)/r_i) / sqrt(c_j)
        U <- U / max(1, RMS(U)/clip_threshold)
        M <- beta1*M + (1-beta1)*U
        R <- beta3*R + (1-beta3)*mean_j((U-M)**2 + eps2)  (rows; C likewise for columns)
        p <- p - lr*weight_decay*p - lr*M * sqrt(mean(R)/R_i) / sqrt(C_j)

    Parameters with fewer than two dimensions keep a full second moment in place of ``r, c`` and
    have no confidence term: ``p <- p - lr*weight_decay*p - lr*M``.

    **Learning rate.** There is no bias correction, as in the paper, and the last division amplifies
    early updates: with the default betas the RMS of the first update is about 11 times ``lr``, that
    of the hundredth 2.5 times, that of the three-thousandth 0.5 times. So warm-up is essential, and
    no one ``lr`` suits short and long runs. ``bias_correction=True`` removes the effect; then keep
    AdamW's ``lr``, best with ``nesterov=True`` as well.

    ``docs/internals/algorithm.md`` lists where this differs from ``came-pytorch`` and why:
    convolutions are factored as ``(out, in*kh*kw)``, bf16 and fp16 parameters are rounded
    stochastically, gradients that are not finite are skipped, and loading keeps every dtype.

    Args:
        params: parameters or dicts of parameter groups, or ``named_parameters()``. fp32, bf16 or
            fp16, any strides. Every option below can be set per group.
        lr: learning rate, a number or a tensor with one element. A tensor is
            rounded to fp32 and read where it is used, so changing it in place works; put it on the
            parameters' device or the CPU.
        betas: decay of momentum, second moment and instability.
        eps: added to the squared gradient and to the instability.
        clip_threshold: largest RMS of the preconditioned gradient of a parameter;
            ``math.inf`` turns clipping off.
        weight_decay: decoupled weight decay.
        optim_bits: 32, or 8, 4 or 2 for momentum in codes of so many bits, in blocks (see
            :mod:`came8bit.variants`), or 0 for none: meant for a group of embeddings, say. The
            default is the class's: 32 for ``CAME``.
        is_paged: keep momentum (and other state of a parameter's size) outside the device, in pages
            that are brought in for a step and written back (``docs/paging.md``). Same bits.
            ``state_dict()`` then copies; ``optimizer.state`` has only what stays on the device.
        page_dir: an existing directory for a page file, for CPU and CUDA parameters alike, used by
            one process at a time. Without one, CUDA parameters have their pages in pinned host
            memory, CPU parameters in an unnamed file in ``$TMPDIR`` or ``/var/tmp``.
        page_budget: bytes that pages may take on each device. Default: on CUDA 256 MiB, or three
            times the largest page; on the CPU a sixteenth of all pages, at most 64 MiB and at
            least the largest page.
        min_8bit_size: parameters with fewer elements keep fp32 momentum; so do vectors, and those
            that codes would not make smaller. Read, like
            ``optim_bits`` and ``factored_view``, when the state of a parameter is made.
        rounding: ``"stochastic"`` or ``"nearest"``, of bf16 and fp16 parameters.
        cautious: drop the elements of an update whose sign disagrees with the gradient, and scale
            the others up (arXiv 2411.16085).
        nonfinite: what to do where the fp32 sum of squares of a gradient is not finite.
            ``"skip"`` leaves that parameter and its state alone and counts (:meth:`skipped_steps`).
            ``"raise"`` looks at all gradients before anything changes and raises
            :class:`FloatingPointError`; it waits for the device twice per step.
            ``"propagate"`` computes with the values as they are.
        maximize: ascend instead of descend.
        bias_correction: divide the moments by ``1 - beta**step``.
        nesterov: move by ``beta1*M + (1-beta1)*U`` in place of ``M`` (Dozat, 2016).
        factored_view: ``"smallest"`` or ``"last_two"``.
        quantize_vectors: let parameters with one dimension have codes, too: for flat shards of
            whole layers. Read when the state of a parameter is made.
        seed: seed of stochastic rounding. The bits depend on it, the parameter's name (or
            position), its step and the element only: equal on every device and replica, and after
            resuming.
        stream: number of the first parameter's random bits, where there are no names and each of
            several optimizers has a part of the model: give each another one.

    Raises:
        ValueError, TypeError: an option or parameter is not usable; the message names it.
    """

    # Settled by the subclass; None leaves the choice to the argument.
    _optim_bits: int | None = None
    _is_paged: bool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        optim_bits: int | None = None,
        is_paged: bool | None = None,
        page_dir: str | os.PathLike[str] | None = None,
        page_budget: int | None = None,
        min_8bit_size: int = DEFAULT_MIN_8BIT_SIZE,
        rounding: str = "stochastic",
        cautious: bool = False,
        nonfinite: str = "skip",
        maximize: bool = False,
        bias_correction: bool = False,
        nesterov: bool = False,
        factored_view: str = "smallest",
        quantize_vectors: bool = False,
        seed: int = DEFAULT_SEED,
        stream: int | None = None,
        **other: object,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "optim_bits": self._settled("optim_bits", optim_bits, self._optim_bits, 32),
            "min_8bit_size": min_8bit_size,
            "rounding": rounding,
            "cautious": cautious,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "bias_correction": bias_correction,
            "nesterov": nesterov,
            "factored_view": factored_view,
            "quantize_vectors": quantize_vectors,
            "seed": seed,
            "stream": stream,
            "format_version": FORMAT_VERSION,
        }
        check_foreign(other)
        defaults.update(normalized(defaults))
        check_options(defaults)
        warn_of_options(defaults)
        paged = self._settled("is_paged", is_paged, self._is_paged, False)
        self._store = store_for(paged, page_dir, page_budget)
        self._skip_warning = SkipWarning()
        self._squares, self._places = {}, []
        self._capture_warning = CaptureWarning()
        super().__init__(params, defaults)

    def _settled(self, name: str, got: Any, fixed: Any, default: Any) -> Any:
        """Return an option that the class may have settled already."""
        if fixed is None:
            return default if got is None else got
        if got is not None and (isinstance(got, Tensor) or got != fixed):
            raise ValueError(
                f"{type(self).__name__}: got {name}={got!r}, expected {fixed!r}; "
                "use CAME, which takes any optim_bits and is_paged"
            )
        return fixed

    # --- groups -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the constructor's.

        Raises:
            ValueError, TypeError: an option or a parameter is not usable. The optimizer is then
                as it was.
        """
        groups = [param_group]
        if isinstance(param_group, dict):
            params = param_group.get("params", [])
            param_group.update(normalized(param_group))
            if not isinstance(params, set):
                params = [params] if isinstance(params, Tensor) else list(params)
                param_group["params"] = params
            options = {**self.defaults, **param_group}
            check_options(options)
            check_params(params, self._params(), options, sharded=self._store.takes_sharded)
            groups = GlobalOptimManager.get_instance().divide(self, param_group)
            for group in groups:
                check_options({**self.defaults, **group})
            self._number_streams(groups, options["stream"], "stream" in param_group)
        for group in groups:
            super().add_param_group(group)
        if self._release is not None:
            self._release.attach(self)

    def _number_streams(self, groups: list[dict[str, Any]], stream: Any, own: bool) -> None:
        """Let no two parameters of new ``groups``, parts of one, count from the same ``stream``.

        Unless it is the group's ``own``, the stream is that of the optimizer's first parameter.
        """
        if stream is None:
            return
        at = int(stream) + (0 if own else sum(1 for _ in self._params()))
        for group in groups:
            if group.get("stream", stream) == stream:
                group["stream"] = at % 2**32
                at += len(group["params"])

    # --- step -------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError, TypeError: an option or a gradient is not usable; nothing has changed.
            FloatingPointError: ``nonfinite="raise"`` and a gradient is not finite.
            OSError, MemoryError: paged state has no room, or is gone; nothing has changed.
        """
        loss = None
        self._capture_warning.look(self.param_groups, stacklevel=6)
        if self._release is not None:
            loss = self._release.finish_step(closure)
        else:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._squares.clear()
            self._update_all(_UNCHANGED)
        self._skip_warning.look(self, self._store, self.param_groups)
        return loss

    @torch.no_grad()
    def _update_all(self, untouched: str) -> None:
        """Update every parameter that has a gradient.

        Args:
            untouched: what has been changed when a check refuses the step, for the error.
        """
        with explaining(untouched), blaming_state(self._store, self.param_groups):
            self._store.drop_others(self._params())
            work = collect(self._store, self.param_groups)
            check_apart(work, self.param_groups, self._places)
            self._prepare(work, self.param_groups)
        with (
            explaining(
                "Parameters that came before this one have been updated", (*OUTSIDE, ValueError)
            ),
            blaming_state(self._store, self.param_groups),
        ):
            step_work(work, self.param_groups, self._store, self._squares)
        self._store.flush()

    @torch.no_grad()
    def _update_one(self, group: Group, param: Tensor, position: int) -> None:
        """Update ``param``, a member of ``group``; errors do not say what has been changed."""
        groups = takewhile(lambda other: other is not group, self.param_groups)
        first = sum(len(other["params"]) for other in groups)
        with blaming_state(self._store, self.param_groups):
            item = collect_one(self._store, param, group, position, first)
            if item is not None:
                work: list[tuple[Group, list[StepItem]]] = [(group, [item])]
                self._prepare(work, ())
                step_work(work, (), self._store, self._squares)

    def _prepare(self, work: list[tuple[Group, list[StepItem]]], groups: Sequence[Group]) -> None:
        """Check what can be checked before the first update, and make missing state.

        Items that only make state, as tools do before they save, are taken out of ``work``.
        ``groups`` are all that take part.
        """
        check_finite(work, self._store, self.param_groups)
        moved = moving(work, groups)
        self._store.prepare(work, self.param_groups)
        for (_, items), kept in zip(work, moved, strict=True):
            items[:] = kept

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    @_disable_dynamo
    def materialize(self) -> None:
        """Make the state of every parameter that trains, as before its first step.

        For tools that save, shard or measure state before training, in place of a step with
        gradients of zero. Nothing is counted: the first step that follows is the first.

        Raises:
            OSError, MemoryError, NotImplementedError: as :meth:`step`; nothing has changed.
        """
        work = [
            (group, [StepItem(param, param, {}, -1)])
            for group in self.param_groups
            for param in group["params"]
            if may_train(param) and not is_lazy(param) and param.numel()
            if not self.state.get(param)
        ]
        with explaining(_UNCHANGED):
            self._store.prepare(work, self.param_groups)

    @_disable_dynamo
    def step_parameter(self, param: Tensor, group: Group, index: int) -> None:
        """Update one parameter, as soon as its gradient is there; once per parameter and step.

        For training loops with backward hooks of their own; :func:`came8bit.step_in_backward` does
        more.

        Args:
            param: ``group["params"][index]``, with a gradient or else left alone.
            group: one of ``param_groups``.

        Raises:
            ValueError: ``param`` is not there.
        """
        first = 0
        for own in self.param_groups:
            if own is group and index < len(own["params"]) and own["params"][index] is param:
                check_options(own)
                with explaining(_UNCHANGED):
                    self._update_one(own, param, first + index)
                return
            first += len(own["params"])
        raise ValueError(
            f"step_parameter: got a parameter of shape {tuple(param.shape)}, expected "
            f"group['params'][{index}] of a group of this optimizer"
        )

    # --- what was measured ------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the 2-norm of the gradients that the last step used, all parameters together.

        The kernels measure it in passing, so it costs nothing, and it is there after
        ``zero_grad()``. With :func:`came8bit.step_in_backward` it counts from the first update in
        ``backward()`` on; with :meth:`step_parameter` it is that of every parameter's last
        gradient.

        Returns:
            fp32, 0-d, on the device of the last parameter; 0 before the first step, infinity or NaN
            where a gradient is not finite. Reading it waits for the device, this call does not.
        """
        totals = list(self._squares.values())
        if not totals:
            return torch.zeros(())
        device = totals[-1].device
        return torch.cat([total.to(device) for total in totals]).sum().sqrt()

    @_disable_dynamo
    def skipped_steps(self) -> int:
        """Count the updates of single parameters skipped so far, because they were not finite.

        Waits for the device. Warns, rarely, and says whether gradients or state are to blame.
        """
        skipped = count_skipped(self._store)
        self._skip_warning.note(skipped, self, self._store, self.param_groups, stacklevel=5)
        return skipped
