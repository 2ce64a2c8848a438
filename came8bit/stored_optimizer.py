"""An optimizer whose state is in a store: shown, saved, loaded and copied from there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from .ops.step import CaptureWarning, SkipWarning
from .state.store import StateStore
from .state_dict import read_state_dict
from .validation import ADDED_OPTIONS

Self = TypeVar("Self", bound="StoredOptimizer")


class Release(Protocol):
    """What the optimizer needs of :mod:`came8bit.step_in_backward` while that is on."""

    def attach(self, optimizer: Any) -> None:
        """Attach to the parameters that are new."""

    def finish_step(self, closure: Callable[[], Any] | None) -> Any:
        """Update what still has a gradient, end the step, and return the closure's loss."""

    def abandon_step(self) -> None:
        """End the step without another update, because the state has been replaced."""


class StoredOptimizer(Optimizer):
    """Keeps its state in ``_store`` and, while it steps in backward, knows its ``_release``."""

    _store: StateStore
    # A copy of the optimizer does not step in backward.
    _release: Release | None = None
    _skip_warning: SkipWarning
    # Sums of squares of the gradients of the last step; see step_group.
    _squares: dict[int, Tensor]
    _capture_warning: CaptureWarning

    @property
    def state(self) -> Any:
        """State by parameter; of paged state, what stays on the device."""
        return self._store.state

    @state.setter
    def state(self, state: Any) -> None:
        self._store.state = state

    def __getstate__(self) -> dict[str, Any]:
        with self._store.complete():
            return {**super().__getstate__(), "store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        store, saved = state.pop("store", None), state.pop("state", None)
        if store is not None:
            self._store = store
        super().__setstate__(state)
        # The base class adds an option that this optimizer does not have.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            for name, value in ADDED_OPTIONS.items():
                group.setdefault(name, value)
        self._skip_warning, self._squares = SkipWarning(), {}
        self._capture_warning = CaptureWarning()
        if saved is not None:
            self._store.adopt(saved)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """Return a copy with state of its own, which is copied parameter by parameter."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        parts = {"defaults": self.defaults, "param_groups": self.param_groups}
        other.__setstate__(deepcopy({**parts, "store": self._store}, memo))
        other._store.reserve(other.param_groups)
        for param, state in self.state.items():
            if isinstance(param, Tensor):
                state = self._store.read(param)
                copied = {name: tensor.clone() for name, tensor in state.items()}
                other._store.write(deepcopy(param, memo), copied)
            else:
                other.state[param] = deepcopy(state, memo)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return groups and complete state, as :class:`torch.optim.Optimizer` does.

        State that is paged is copied into ordinary CPU tensors; :func:`came8bit.save_checkpoint`
        needs no such copy.
        """
        self._capture_warning.look(self.param_groups)
        hooks = self._optimizer_state_dict_pre_hooks
        for hook in hooks.values():
            hook(self)
        try:
            # They have run: what they change has to be seen by complete().
            self._optimizer_state_dict_pre_hooks = OrderedDict()
            with self._store.complete():
                return super().state_dict()
        finally:
            self._optimizer_state_dict_pre_hooks = hooks

    @_disable_dynamo
    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        allow_missing: bool = False,
        allow_unused: bool = False,
    ) -> None:
        """Continue from what :meth:`state_dict` returned; nothing is shared with ``state_dict``.

        Tensors keep their dtype and move to their parameter's device, or to its page: whether
        state is paged, and where, is this optimizer's own affair. The options come from
        ``state_dict``; those that it lacks stay as they are. A step in backward that is under way
        is over, without another update. Hooks run as in :class:`torch.optim.Optimizer`.

        Parameters are matched by name where both sides have the same unique names, else by
        position. ``optim_bits`` stays this optimizer's own: momentum in other bits is converted,
        with a :class:`UserWarning`, as in :func:`came8bit.load_checkpoint`.

        Args:
            state_dict: of an optimizer of this package.
            allow_missing: let parameters that were not saved, had another shape, or whose saved
                state cannot be continued, start without state. Needs names on both sides.
            allow_unused: leave out what was saved for parameters that this optimizer does not have.

        Raises:
            ValueError: the state belongs to another optimizer, a newer version or other
                parameters. The optimizer is then as it was.
            OSError, MemoryError: no room for pages. The optimizer is then as it was.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups, saved = read_state_dict(
            state_dict, self.param_groups, allow_missing=allow_missing, allow_unused=allow_unused
        )
        self._store.replace_all(saved)
        self.__setstate__({"param_groups": groups})
        self._state_replaced()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_replaced(self) -> None:
        """End a step in backward that is under way, and start counting skips again."""
        self._skip_warning = SkipWarning()
        if self._release is not None:
            self._release.abandon_step()
