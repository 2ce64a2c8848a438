"""Which saved parameter is which, what the options become, and which state fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import listed
from ..reference.rungs import momentum_shape
from ..state.layout import Group, Layout, plan_state, possible_layouts
from ..state.store import fit
from ..validation import ADDED_OPTIONS, FORMAT_VERSION, check_options
from .values import Differences, names_of, order_of, with_momentum

OWN_OPTIONS = frozenset({"params", "param_names", "optim_bits", "format_version"})
"""What an optimizer keeps of its own: whose state it is, and how it is stored."""


@dataclass(frozen=True)
class SavedParameter:
    """What was saved of one parameter.

    Attributes:
        name: ``None`` without names.
        group: number of its group.
        shape: ``None`` where it is not saved.
        layout: of its state; ``None`` without state, or where only its parameter can tell.
        state: the state where ``layout`` has to be found.
    """

    name: str | None
    group: int
    shape: tuple[int, ...] | None = None
    layout: Layout | None = None
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A parameter of the optimizer and the saved one that belongs to it.

    Attributes:
        param: of the optimizer.
        position: of ``param`` in the optimizer.
        label: its name or position, for messages.
        saved: position among the saved ones; ``None`` if it is missing there.
        layout: of the saved state; ``None`` if there is none to load.
        wanted: of the state after loading.
    """

    param: Tensor
    position: int
    label: str
    saved: int | None
    layout: Layout | None = None
    wanted: Layout | None = None


@dataclass(frozen=True)
class Merge:
    """What loading will do.

    Attributes:
        pairs: every parameter once, in the optimizer's order.
        groups: what the groups of the optimizer become.
        partners: the saved group of each of the optimizer's, ``None`` for a new one.
        differences: what will not be as it was saved.
    """

    pairs: Sequence[Pair]
    groups: list[dict[str, Any]]
    partners: Sequence[int | None]
    differences: Differences

    def without_faults(self, faults: Mapping[int, str | None], allow_missing: bool) -> Merge:
        """Leave out or refuse the states that :func:`~..state.layout.find_fault` complains of.

        Args:
            faults: position of a saved parameter to what is wrong with its state.
            allow_missing: whether parameters may start without state instead.

        Raises:
            ValueError: a state cannot be continued; the message names the parameter.
        """
        members = [group for group in self.groups for _ in group["params"]]
        pairs, missing, kept = [], list(self.differences.missing), []
        for pair, group in zip(self.pairs, members, strict=True):
            fault = None if pair.saved is None or not pair.wanted else faults.get(pair.saved)
            if fault is not None:
                if group["nonfinite"] == "propagate" and "negative" not in fault:
                    kept.append(f"{pair.label}: {fault}")
                elif not allow_missing:
                    raise ValueError(
                        f"the state of parameter {pair.label} cannot be continued: {fault}; with "
                        "allow_missing=True such parameters start without state"
                    )
                else:
                    pair = replace(pair, layout=None, wanted=None)
                    missing.append(pair.label)
            pairs.append(pair)
        found = replace(self.differences, missing=missing, not_finite=kept)
        return replace(self, pairs=pairs, differences=found)


def merge(
    own_groups: Sequence[Group],
    saved_groups: Sequence[Group],
    saved: Sequence[SavedParameter],
    *,
    allow_missing: bool = False,
    allow_unused: bool = False,
    strict_names: bool = True,
    kept: frozenset[str] = OWN_OPTIONS,
) -> Merge:
    """Pair the parameters of ``own_groups`` with the ``saved`` ones and merge the options.

    By name if both sides have unique names, else by position; with ``strict_names=False`` also
    where the names differ. Saved options win; those that are not saved, and the ``kept`` ones,
    stay. With ``allow_missing`` a parameter whose saved namesake has another shape is missing, too.

    Raises:
        ValueError: they do not fit together; the message says where.
    """
    check_versions(saved_groups, any(one.layout or one.state for one in saved))
    members = [(p, index) for index, group in enumerate(own_groups) for p in group["params"]]
    names = names_of(own_groups)
    saved_names = [one.name for one in saved if one.name is not None]
    by_name = bool(names) and bool(saved_names) and len(set(saved_names)) == len(saved)
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()
    renamed: Sequence[str] = ()
    order: Sequence[int | None] = ()
    if by_name and names:
        try:
            order, wrappers = order_of(
                names, saved_names, allow_missing=allow_missing, allow_unused=allow_unused
            )
        except ValueError:
            same_size = len(names) == len(saved)
            if strict_names or allow_missing or allow_unused or not same_size:
                raise
            by_name = False
            renamed = [name for name in names if name not in saved_names]
    if not by_name:
        _compare_sizes(own_groups, saved_groups, saved, allow_missing or allow_unused)
        order = range(len(members))
        unsure = [] if names else _alike(saved, [param for param, _ in members])
    partners = _pair_groups(saved_groups, saved, own_groups, order)
    lost = set(range(len(saved_groups))) - set(partners)
    if (None in partners and not allow_missing) or (lost and not allow_unused):
        raise _divided(own_groups, saved_groups)
    ours = any("format_version" in group for group in saved_groups)
    options = [{**(ADDED_OPTIONS if ours else {}), **group} for group in saved_groups]
    groups = [
        _merge_options(own, {} if partner is None else options[partner], partner, kept)
        for own, partner in zip(own_groups, partners, strict=True)
    ]
    pairs = [
        Pair(param, position, _label(names, saved, position, place), place)
        for position, ((param, _), place) in enumerate(zip(members, order, strict=True))
    ]
    apart = by_name and allow_missing
    if not apart:
        _compare_shapes(pairs, saved, by_name)
    for position, pair in enumerate(pairs):
        if pair.saved is not None:
            one, group = saved[pair.saved], groups[members[position][1]]
            bits = saved_groups[one.group].get("optim_bits", group["optim_bits"])
            if apart and not _same_shape(pair, one):
                pairs[position] = replace(pair, saved=None)
            else:
                pairs[position] = _fitted(pair, one, group, same=bits == group["optim_bits"])
    differences = _differences(pairs, saved, "name" if by_name else "position")
    differences = replace(differences, wrappers=wrappers, unsure=unsure, renamed=renamed)
    return Merge(pairs, groups, partners, differences)


def check_versions(groups: Sequence[Group], has_state: bool) -> None:
    """Refuse state of a version that this package does not know.

    A tool may have dropped the version of a group: that of the others counts.
    """
    versions = [group.get("format_version") for group in groups]
    found = [version for version in versions if version is not None]
    if has_state and not found:
        raise ValueError(
            "no group has a format_version, so came8bit did not write this state (the first "
            f"group's keys are {sorted(map(str, groups[0]))}); the state of another optimizer "
            "cannot be continued, start with a fresh one and warm up again (load_checkpoint reads "
            "files of came-pytorch)"
        )
    for index, version in enumerate(versions):
        known = type(version) is int and 1 <= version <= FORMAT_VERSION
        if version is not None and not known:
            raise ValueError(
                f"group {index} has format_version {version!r}, this came8bit reads 1 to "
                f"{FORMAT_VERSION}; upgrade came8bit"
            )


def check_group(group: Group, index: int | None) -> None:
    """Check the options of a group, whatever values a file or a dict has for them.

    Raises:
        ValueError: they are not options of this package; the message has ``index``.
    """
    try:
        check_options(group)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"group {index}: {what}") from error


def same_option(first: Any, second: Any) -> bool:
    """Return whether two values of an option are equal, tensors and numbers told apart."""
    if isinstance(first, (list, tuple)) and type(first) is type(second):
        return len(first) == len(second) and all(map(same_option, first, second))
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
    return type(first) is type(second) and bool(first == second)


# --- one side against the other -------------------------------------------------------------------


def _label(
    names: Sequence[str] | None, saved: Sequence[SavedParameter], position: int, place: int | None
) -> str:
    found = None if place is None else saved[place].name
    return found or (names[position] if names else str(position))


def _alike(saved: Sequence[SavedParameter], params: Sequence[Tensor]) -> list[str]:
    """Return the parameters with state that another has the shape of: could be swapped."""
    shapes = Counter(param.shape for param in params)
    return [
        one.name
        for one, param in zip(saved, params, strict=True)
        if one.name is not None and (one.layout or one.state) and shapes[param.shape] > 1
    ]


def _compare_sizes(
    own_groups: Sequence[Group],
    saved_groups: Sequence[Group],
    saved: Sequence[SavedParameter],
    parts: bool,
) -> None:
    own = [len(group["params"]) for group in own_groups]
    counts = Counter(one.group for one in saved)
    found = [counts[index] for index in range(len(saved_groups))]
    if own != found:
        raise ValueError(
            f"got groups of {found} parameters, expected groups of {own} in this order (not both "
            "sides have unique names, so the order decides); build the optimizer over the model "
            "that was saved, with the same groups"
            + (" (parts of a state need named_parameters() on both sides)" if parts else "")
        )


def _pair_groups(
    saved_groups: Sequence[Group],
    saved: Sequence[SavedParameter],
    own_groups: Sequence[Group],
    order: Sequence[int | None],
) -> list[int | None]:
    """Return the saved group of each of the optimizer's, ``None`` where nothing of it was saved."""
    places = iter(order)
    partners = [
        {saved[place].group for _ in group["params"] if (place := next(places)) is not None}
        for group in own_groups
    ]
    taken = [min(partner) for partner in partners if partner]
    if any(len(partner) > 1 for partner in partners) or len(set(taken)) != len(taken):
        raise _divided(own_groups, saved_groups)
    # Groups without parameters belong together in the order in which they come.
    filled = {one.group for one in saved}
    empty = (index for index in range(len(saved_groups)) if index not in filled)
    return [
        min(partner) if partner else None if group["params"] else next(empty, None)
        for partner, group in zip(partners, own_groups, strict=True)
    ]


def _divided(own_groups: Sequence[Group], saved_groups: Sequence[Group]) -> ValueError:
    return ValueError(
        f"got {len(saved_groups)} groups of parameters, divided otherwise than the "
        f"{len(own_groups)} of this optimizer, so it is not clear which options are whose; build "
        "the optimizer with the same groups"
    )


def _same_shape(pair: Pair, saved: SavedParameter) -> bool:
    """Return whether what was saved is of a parameter of this shape, as far as it tells."""
    shape = tuple(pair.param.shape)
    if saved.shape is None and "exp_avg" in saved.state:
        return momentum_shape(saved.state, shape) == shape
    return saved.shape in (None, shape)


def _compare_shapes(pairs: Sequence[Pair], saved: Sequence[SavedParameter], by_name: bool) -> None:
    wrong = []
    for pair in pairs:
        shape = None if pair.saved is None else saved[pair.saved].shape
        if shape is not None and shape != tuple(pair.param.shape):
            wrong.append(f"{pair.label}: {shape}, expected {tuple(pair.param.shape)}")
    if wrong:
        raise ValueError(
            f"the saved state is for other parameters: got shapes {listed(wrong)}; build the "
            "optimizer over the model that was saved, "
            + (
                "or pass allow_missing=True to start these without state"
                if by_name
                else "with its parameters in the same order"
            )
        )


def _merge_options(
    own: Group, saved: Group, index: int | None, kept: frozenset[str]
) -> dict[str, Any]:
    merged = {**own, "format_version": FORMAT_VERSION}
    for key, value in saved.items():
        if key not in kept:
            here = own.get(key)
            if isinstance(value, Tensor):
                value = value.to(here.device) if isinstance(here, Tensor) else value
                merged[key] = value.clone()
            else:
                merged[key] = deepcopy(value)
    # The saved bits do not stay, but say what the state is.
    check_group({**merged, "optim_bits": saved.get("optim_bits", own["optim_bits"])}, index)
    return merged


def _fitted(pair: Pair, saved: SavedParameter, group: Group, same: bool) -> Pair:
    """Return ``pair`` with the layouts of its state, before and after loading."""
    layout, shape = saved.layout, tuple(pair.param.shape)
    if layout is None and not saved.state:
        return pair
    planned = plan_state(pair.param, group)
    if layout is None:
        try:
            # Options that decide the layout may have been changed after the state was made.
            layout = fit(saved.state, [planned, *possible_layouts(shape)])
        except ValueError as error:
            raise ValueError(
                f"the state of parameter {pair.label} (shape {shape}) does not fit: {error}; load "
                "it over the same parameters in the same order"
            ) from error
    wanted = layout if same else with_momentum(layout, planned.momentum_bits, shape)
    return replace(pair, layout=layout, wanted=wanted)


def _differences(
    pairs: Sequence[Pair], saved: Sequence[SavedParameter], matched_by: str
) -> Differences:
    converted: dict[str, list[str]] = {}
    moved, missing = [], []
    for pair in pairs:
        if pair.saved is None:
            missing.append(pair.label)
        elif pair.layout is not None and pair.wanted is not None:
            if pair.layout != pair.wanted:
                what = f"{pair.layout.momentum_bits} to {pair.wanted.momentum_bits} bits"
                converted.setdefault(what, []).append(pair.label)
            if pair.saved != pair.position:
                moved.append(pair.label)
    used = {pair.saved for pair in pairs}
    unused = [one.name or str(place) for place, one in enumerate(saved) if place not in used]
    return Differences(
        matched_by=matched_by, converted=converted, moved=moved, missing=missing, unused=unused
    )
