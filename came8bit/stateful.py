"""Where an optimizer's state lives, and how it is made, saved, loaded and copied.

The optimizer classes inherit this part; the rule and the step are in :mod:`came8bit.optim`.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .errors import remark
from .paging.store import Pager
from .state import store
from .state.layout import Layout, plan_state, possible_layouts
from .state.store import Saved
from .state_dict import read_state_dict
from .validation import Group, Work

_HALF_LOADED = "A part of the state has been replaced: load again before the next step"

Self = TypeVar("Self", bound="StatefulOptimizer")


def _ordinary(param: Tensor) -> bool:
    """Neither meta nor sharded."""
    return not (param.is_meta or hasattr(param, "placements"))


def _trains(param: Tensor) -> bool:
    """Whether a step may reach it."""
    return param.requires_grad or param.grad is not None


class StatefulOptimizer(Optimizer):
    """An optimizer whose state is dense, beside the parameters, or paged.

    ``self.state`` has all tensors of dense state.  Of paged state it has what stays on the device;
    the rest is in the pager, and :meth:`_read_state` puts both together.
    """

    _pager: Pager | None = None
    # Set while came8bit.step_in_backward steps in backward; a copy of the optimizer does not.
    _release: Any = None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._pager is not None:
            state.update(state=self._complete_state(), placement=self._pager.placement)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        placement = state.pop("placement", None)
        super().__setstate__(state)
        # The base class adds an option that this optimizer does not have.
        self.defaults.pop("differentiable", None)
        if placement is not None:
            self._pager = Pager(placement)
            self.state = self._place(
                Saved(param, store.fit(saved, possible_layouts(param.shape)), saved)
                for param, saved in self.state.items()
                if saved
            )

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A copy with pages of its own, copied one by one."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(deepcopy(super().__getstate__(), memo))
        if self._pager is not None:
            other._pager = Pager(self._pager.placement)
            for param, state in self.state.items():
                if param in self._pager and "exp_avg" not in state:
                    other._write_state(memo[id(param)], self._read_state(param))
        return other

    # --- making state -----------------------------------------------------------------------------

    def _fits(self, param: Tensor, state: dict[str, Tensor]) -> bool:
        """Whether ``param`` is still what ``state`` was made for; paged state follows it."""
        if self._pager is None and state["step"].device != param.device:
            return False
        return self._state_shape(param, state) == param.shape

    def _state_shape(self, param: Tensor, state: dict[str, Tensor]) -> torch.Size | None:
        """Shape of the parameter that ``state`` was made for, if the state is complete."""
        if "exp_avg" in state:
            return state["exp_avg"].shape
        return None if self._pager is None else self._pager.shape(param)

    def _make_missing_state(self, work: list[tuple[Group, list[Work]]]) -> None:
        """Fill the empty states in ``work``; only then put them into ``self.state``."""
        fresh = [(item, group) for group, members in work for item in members if not item.state]
        for item, _ in fresh:
            if not _ordinary(item.param):
                raise NotImplementedError(
                    f"parameter {item.position} is a {type(item.param).__name__} on "
                    f"{item.param.device}; meta and sharded (DTensor) parameters are not supported"
                )
        if fresh and self._pager is not None:
            self._pager.reserve(self._missing_layouts())
        for item, group in fresh:
            item.state.update(self._allocate(item.param, plan_state(item.param, group)))
        items = [item for _, members in work for item in members]
        if items and self._pager is not None:
            self._pager.prepare([item.param for item in items if "exp_avg" not in item.state])
            for item in items:
                if item.state["step"].device != item.param.device:
                    for name, tensor in item.state.items():
                        item.state[name] = tensor.to(item.param.device)
        for item, _ in fresh:
            self.state[item.param] = item.state

    def _allocate(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        if self._pager is not None:
            return self._pager.allocate(param, layout)
        return store.allocate(layout, param.device)

    def _missing_layouts(self) -> Iterator[tuple[Tensor, Layout]]:
        """All that have no state yet, not only those of this step: room is reserved once."""
        for group in self.param_groups:
            for param in filter(_trains, group["params"]):
                if not self.state.get(param) and _ordinary(param) and param.numel():
                    yield param, plan_state(param, group)

    # --- paging: nothing to do where state is dense -----------------------------------------------

    def _free_pages(self) -> None:
        """Let go of pages whose parameter has left its group, and its state ``self.state``.

        Where only the group is gone, the state waits for the parameter to come back, as dense state
        does.
        """
        if self._pager is not None:
            members = (param for group in self.param_groups for param in group["params"])
            self._pager.drop_others(chain(self.state, members))

    def _check_pages(self) -> None:
        """Make and check the pages of all parameters that a step may reach, before it reaches any.

        Raises:
            OSError, MemoryError, ValueError, NotImplementedError: as an ordinary step.
        """
        if self._pager is not None:
            self._free_pages()
            self._pager.reserve(self._missing_layouts())
            members = (param for group in self.param_groups for param in group["params"])
            self._pager.check(filter(_trains, members))

    def _expect_order(self, params: Iterable[Tensor]) -> None:
        """Say in which order :meth:`_run` will get ``params``, so that pages come ahead of use.

        The order is expected again in every step until another one is set; an empty one makes each
        step's own order count.
        """
        if self._pager is not None:
            self._pager.set_order(params)

    def _flush(self) -> None:
        """Finish what a step has left under way; call it once after the last :meth:`_run`."""
        if self._pager is not None:
            self._pager.flush()

    # --- state of one parameter -------------------------------------------------------------------

    def _read_state(self, param: Tensor) -> dict[str, Tensor]:
        """The complete state of ``param``, empty before its first step; not to be written to.

        Paged buffers are a window of the page file or in pinned memory, whatever device ``param``
        is on, and good until the next step or the next :meth:`_write_state` of ``param``.
        """
        state: dict[str, Tensor] = self.state.get(param) or {}
        if not state or "exp_avg" in state or self._pager is None:
            return state
        return {**self._pager.read(param), **state}

    def _write_state(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Replace the state of ``param`` by tensors on its device that nobody else uses.

        Where state is paged, the tensors are copied, and may be on any device.
        """
        if state and self._pager is not None:
            layout = store.fit(state, possible_layouts(param.shape))
            if param not in self._pager:
                self._pager.reserve(self._missing_layouts())
            self._pager.reserve([(param, layout)])
            state = self._pager.write(param, layout, state)
        self.state[param] = state

    def _complete_state(self) -> defaultdict[Any, Any]:
        """Ordinary state: what is paged, copied into CPU memory."""
        complete: defaultdict[Any, Any] = defaultdict(dict)
        for param, state in self.state.items():
            complete[param] = state
            if isinstance(param, Tensor):
                # The small tensors are copied, too, or later steps would change part of the whole.
                state = self._read_state(param)
                complete[param] = {name: tensor.clone() for name, tensor in state.items()}
        return complete

    def _place(self, saved: Iterable[Saved]) -> defaultdict[Tensor, Any]:
        """New ``self.state`` with what was saved, where this optimizer keeps it."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        if self._pager is None:
            for param, layout, tensors in saved:
                state[param] = store.copy(tensors, layout, param.device)
            return state
        saved = list(saved)
        pager = self._pager if self._pager.usable() else Pager(self._pager.placement)
        with remark("Nothing has been changed"):
            pager.reserve((param, layout) for param, layout, _ in saved)
        in_place = pager is self._pager
        with remark(_HALF_LOADED if in_place else "Nothing has been changed"):
            for param, layout, tensors in saved:
                state[param] = pager.write(param, layout, tensors)
        pager.drop_others(state)
        self._pager = pager
        return state

    def _state_replaced(self) -> None:
        """A state has been loaded: end a step in backward that is under way."""
        if self._release is not None:
            self._release.abandon_step()

    # --- saving and loading -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups and complete state, as :class:`torch.optim.Optimizer` returns them.

        State that is paged is copied into ordinary CPU tensors; :func:`came8bit.save_checkpoint`
        needs no such copy.
        """
        if self._pager is None:
            return super().state_dict()
        hooks, state = self._optimizer_state_dict_pre_hooks, self.state
        for hook in hooks.values():
            hook(self)
        try:
            self._optimizer_state_dict_pre_hooks = OrderedDict()
            state, self.state = self.state, self._complete_state()
            return super().state_dict()
        finally:
            self._optimizer_state_dict_pre_hooks, self.state = hooks, state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned; nothing is shared with ``state_dict``.

        Tensors keep their dtype and move to their parameter's device, or to its page: whether
        state is paged, and where, is this optimizer's own affair.  The options come from
        ``state_dict``; those that it lacks stay as they are.  A step in backward that is under way
        is over, without another update.  Hooks run as in :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: the state belongs to another optimizer, a newer version or other
                parameters.  The optimizer is then as it was.
            OSError, MemoryError: no room for pages.  The optimizer is then as it was.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups, saved = read_state_dict(state_dict, self.param_groups)
        self.__setstate__({"state": self._place(saved), "param_groups": groups})
        self._state_replaced()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
