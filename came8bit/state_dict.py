"""From a saved state dict to groups and state for an optimizer; raises before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from .state import store
from .state.layout import Group, plan_state, possible_layouts
from .state.store import Saved
from .validation import ADDED_OPTIONS, FORMAT_VERSION, check_options


def read_state_dict(
    state_dict: Mapping[str, Any], own_groups: Sequence[Group]
) -> tuple[list[dict[str, Any]], list[Saved]]:
    """New ``param_groups`` of an optimizer that has ``own_groups``, and the state to copy into it.

    Saved options win; those that are not saved stay as they are in ``own_groups``, and so do the
    parameters.  The state is that of ``state_dict``, not copied.

    Raises:
        ValueError: the state is another optimizer's, newer, or for other parameters.
    """
    try:
        missing = [key for key in ("state", "param_groups") if key not in state_dict]
        if missing:
            raise ValueError(f"got a dict without {missing}, expected what state_dict() returned")
        groups = _merge_groups(state_dict, own_groups)
        return groups, _check_state(state_dict, groups)
    except ValueError as error:
        raise ValueError(f"load_state_dict: {error}; nothing has been changed") from error


def _merge_groups(
    state_dict: Mapping[str, Any], own_groups: Sequence[Group]
) -> list[dict[str, Any]]:
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in own_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(f"got groups of {saved_sizes} parameters, expected groups of {sizes}")
    merged = []
    for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
        _check_version(saved, index, has_state=bool(state_dict["state"]))
        group = {
            **own,
            **(ADDED_OPTIONS if "format_version" in saved else {}),
            **{key: deepcopy(value) for key, value in saved.items() if key != "params"},
            "format_version": FORMAT_VERSION,
        }
        if group["optim_bits"] != own["optim_bits"]:
            raise ValueError(
                f"group {index} was saved with optim_bits={group['optim_bits']!r}, this optimizer "
                f"has {own['optim_bits']}: construct it with the same"
            )
        try:
            check_options(group)
        except ValueError as error:
            raise ValueError(f"group {index}: {error}") from error
        merged.append(group)
    return merged


def _check_version(saved: Group, index: int, has_state: bool) -> None:
    version = saved.get("format_version")
    if version is None:
        if not has_state:
            return
        raise ValueError(
            f"group {index} has no format_version, so came8bit did not write this state (the "
            f"group's keys are {sorted(map(str, saved))}); the state of another optimizer cannot "
            "be continued, start with a fresh one and warm up again"
        )
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"group {index} has format_version {version!r}, this came8bit reads 1 to "
            f"{FORMAT_VERSION}; upgrade came8bit"
        )


def _check_state(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> list[Saved]:
    saved_state = state_dict["state"]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    strangers = set(saved_state) - set(keys)
    if strangers:
        raise ValueError(f"got state for parameters {strangers}, which no saved group lists")
    members = [(param, group) for group in groups for param in group["params"]]
    found = []
    for position, (key, (param, group)) in enumerate(zip(keys, members, strict=True)):
        saved = saved_state.get(key)
        if saved:
            # Options that decide the layout may have been changed after the state was made.
            layouts = [plan_state(param, group), *possible_layouts(param.shape)]
            try:
                found.append(Saved(param, store.fit(saved, layouts), saved))
            except ValueError as error:
                raise ValueError(
                    f"the state of parameter {position} (shape {tuple(param.shape)}) does not "
                    f"fit: {error}; load it over the same parameters in the same order"
                ) from error
    return found
