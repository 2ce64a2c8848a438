"""Saved state for an optimizer: one merge for state dicts and for files.

:mod:`.merge` decides which saved parameter is which, what the options become and which state fits;
:mod:`.values` what is wrong with values, and converts momentum. All of it before anything changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import listed, printable
from ..reference.rungs import RUNGS, rung_of
from ..state.layout import COUNTERS, Group, Layout, find_fault
from ..state.sharding import full, local, mesh_of, sum_over
from ..state.store import Saved
from .merge import SavedParameter, merge
from .values import as_count, convert_momentum, names_of


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
