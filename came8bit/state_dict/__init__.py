"""An optimizer whose state is in a store: saved, loaded, pickled and copied from there.

:mod:`.merge` decides which saved parameter is which, what the options become and which state fits,
for state dicts and for files; :mod:`.values` what is wrong with values, and converts momentum. All
of it before anything changes.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from ..errors import listed, printable
from ..ops.step import CaptureWarning, SkipWarning
from ..reference.rungs import RUNGS, rung_of
from ..state.layout import COUNTERS, Group, Layout, find_fault
from ..state.sharding import full, local, mesh_of, sum_over
from ..state.store import Saved, StateStore
from ..validation import ADDED_OPTIONS
from .merge import SavedParameter, merge
from .values import as_count, convert_momentum, names_of

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
    # Where parameters are; see check_apart.
    _places: list[int]
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
        self._skip_warning, self._squares, self._places = SkipWarning(), {}, []
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
        self, state_dict: dict[str, Any], *, allow_missing: bool = False, allow_unused: bool = False
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


def read_state_dict(
    state_dict: Mapping[str, Any],
    own_groups: Sequence[Group],
    *,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> tuple[list[dict[str, Any]], list[Saved]]:
    """Read what :meth:`torch.optim.Optimizer.state_dict` returned.

    A :class:`UserWarning` tells what will not be as it was saved.

    Returns:
        The new ``param_groups`` of an optimizer that has ``own_groups``, and the state to copy into
        it, which is that of ``state_dict`` where nothing is converted.

    Raises:
        ValueError: the state is another optimizer's, newer, or for other parameters.
    """
    try:
        missing = [key for key in ("state", "param_groups") if key not in state_dict]
        if missing:
            raise ValueError(f"got a dict without {missing}, expected what state_dict() returned")
        saved_groups, saved, strangers = _parameters(state_dict)
        # torch compares no names: different ones are not an error in a state dict.
        found = merge(
            own_groups,
            saved_groups,
            saved,
            allow_missing=allow_missing,
            allow_unused=allow_unused,
            strict_names=False,
        )
        if strangers and not allow_unused:
            raise ValueError(
                f"got state for parameters {listed(strangers)}, which no saved group lists; "
                "allow_unused=True leaves it out"
            )
        found = found.without_faults(_find_faults([one.state for one in saved]), allow_missing)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        what = str(error)
        if not isinstance(error, ValueError):
            what = f"the state dict makes no sense ({type(error).__name__}: {what})"
        text = printable(f"load_state_dict: {what}; nothing has been changed", 4000)
        raise ValueError(text) from error
    for group, partner in zip(found.groups, found.partners, strict=True):
        if partner is None or found.differences.matched_by == "name":
            continue
        if "param_names" in saved_groups[partner]:  # wins, as in torch
            group["param_names"] = list(saved_groups[partner]["param_names"])
    loaded = [
        Saved(pair.param, pair.wanted, _converted(saved[pair.saved].state, pair.wanted))
        for pair in found.pairs
        if pair.wanted is not None and pair.saved is not None
    ]
    unused = [*found.differences.unused, *strangers]
    remarks = replace(found.differences, unused=unused).remarks()
    if remarks:
        warnings.warn(
            printable(f"load_state_dict: {'; '.join(remarks)}"), UserWarning, stacklevel=5
        )
    return found.groups, loaded


def _find_faults(states: Sequence[Mapping[str, Any]]) -> dict[int, str | None]:
    """Return what is wrong with each state; on the ranks that share them, the same."""
    faults = [find_fault({name: local(x) for name, x in state.items()}) for state in states]
    mesh = mesh_of(value for state in states for value in state.values())
    if mesh is not None:
        counts = sum_over(mesh, [fault is not None for fault in faults])
        there = "a part on another rank cannot be continued"
        faults = [fault or (there if n else None) for fault, n in zip(faults, counts, strict=True)]
    return dict(enumerate(faults))


def _converted(state: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
    """Return ``state`` with the momentum of ``layout``, of a sharded one whole if it changes."""
    if rung_of(state["exp_avg"], state.get("absmax", state.get("scales"))) is RUNGS.get(
        layout.momentum_bits
    ):
        return state
    return convert_momentum({name: full(value) for name, value in state.items()}, layout)


def _parameters(
    state_dict: Mapping[str, Any],
) -> tuple[Sequence[Group], list[SavedParameter], list[str]]:
    """Return the groups, the parameters, and the keys of states that belong to none of them."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    keys = [key for group in groups for key in group["params"]]
    for index, group in enumerate(groups):
        if len(list(group.get("param_names", group["params"]))) != len(group["params"]):
            raise ValueError(f"group {index} has too many names, or too few")
    names: Sequence[str | None] = names_of(groups) or [None] * len(keys)
    group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
    saved = []
    for position, (key, name, group) in enumerate(zip(keys, names, group_of, strict=True)):
        state = states.get(key) or {}
        if not isinstance(state, Mapping):
            raise ValueError(
                f"got the state of a parameter as {type(state).__name__}, expected a dict"
            )
        try:
            counts = {
                counter: torch.tensor(as_count(state[counter], counter))
                for counter in COUNTERS
                if counter in state and not getattr(state[counter], "is_meta", False)
            }
        except ValueError as error:
            raise ValueError(f"the state of parameter {name or position}: {error}") from error
        saved.append(SavedParameter(name, group, state={**state, **counts}))
    known = set(keys)
    return groups, saved, [str(key) for key in states if key not in known]
