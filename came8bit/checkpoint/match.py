"""Which saved parameter belongs to which of an optimizer's, and what its options become.

Wrappers put words of their own into the names of what they wrap: a model that was saved under
``DistributedDataParallel`` or ``torch.compile`` has other names than the bare one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..state.layout import plan, plan_state
from ..validation import ADDED_OPTIONS, FORMAT_VERSION, check_options
from .format import Entry, dtype_name, label
from .reader import Source

Group = Mapping[str, Any]

OWN_OPTIONS = frozenset({"params", "param_names", "optim_bits", "format_version"})
"""What an optimizer keeps of its own: whose state it is, and how it is stored."""


@dataclass(frozen=True)
class Pair:
    """A parameter of the optimizer and the saved one that belongs to it.

    Attributes:
        param: of the optimizer.
        position: of ``param`` in the optimizer.
        saved: position in the file.
        bits: of the momentum after loading; ``None`` if there is no state to load.
    """

    param: Tensor
    position: int
    saved: int
    bits: int | None


@dataclass(frozen=True)
class Match:
    """What loading will do: every parameter once, in the optimizer's order.

    Attributes:
        pairs: the parameters.
        groups: what the options of the groups become.
        by_name: whether names were compared, else positions.
        wrappers: what had to be left out of names for them to be the same, such as ``module.``.
        unsure: names in the file of parameters that only their position told apart, although they
            have names there.
    """

    pairs: Sequence[Pair]
    groups: Sequence[dict[str, Any]]
    by_name: bool
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()


def match(own_groups: Sequence[Group], source: Source) -> Match:
    """Pair the parameters of ``own_groups`` with those of ``source`` and merge the options.

    By name if both sides have names, else by position.  Where names differ in what wrappers put
    into them, it is left out.

    Raises:
        CheckpointError: they do not fit together; the message says where.
    """
    names = own_names(own_groups)
    saved_names = [entry.name for entry in source.entries]
    by_name = names is not None and bool(names) and None not in saved_names
    members = [(p, index) for index, group in enumerate(own_groups) for p in group["params"]]
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()
    if by_name and names is not None:
        order, wrappers = order_of(names, [str(name) for name in saved_names])
    else:
        _compare_sizes(own_groups, source)
        order = list(range(len(members)))
        if names is None:
            unsure = _alike(source.entries)
    group_of = _pair_groups(own_groups, source, [group for _, group in members], order)
    _compare_shapes([param for param, _ in members], source.entries, order)
    # What came-pytorch does is no choice of its user: it is refused below or makes no difference.
    kept = OWN_OPTIONS | ({"factored_view"} if source.kind == "came-pytorch" else set())
    groups = [
        _merge(own, source.groups[group_of[index]], index, kept)
        for index, own in enumerate(own_groups)
    ]
    pairs = []
    for position, ((param, index), saved) in enumerate(zip(members, order, strict=True)):
        same = groups[index]["optim_bits"] == source.groups[group_of[index]].get("optim_bits")
        layout = source.entries[saved].layout
        bits = None
        if layout is not None:
            wanted = layout if same else plan_state(param, groups[index])
            bits = wanted.momentum_bits
        pairs.append(Pair(param, position, saved, bits))
    if source.kind == "came-pytorch":
        _check_views(pairs, [groups[group] for _, group in members], source.entries)
    return Match(pairs, groups, by_name, wrappers, unsure)


def _alike(entries: Sequence[Entry]) -> list[str]:
    """Names of parameters with state that has the shape of another's: they could be swapped."""
    shapes = Counter(entry.shape for entry in entries)
    return [
        entry.name
        for entry in entries
        if entry.name is not None and entry.step is not None and shapes[entry.shape] > 1
    ]


def _compare_sizes(own_groups: Sequence[Group], source: Source) -> None:
    own = [len(group["params"]) for group in own_groups]
    saved = [0] * len(source.groups)
    for entry in source.entries:
        saved[entry.group] += 1
    if own != saved:
        raise CheckpointError(
            f"the file has groups of {saved} parameters, expected groups of {own} in this order "
            "(not both sides have unique names, so the order decides); build the optimizer over "
            "the model that was saved, with the same groups"
        )


def _pair_groups(
    own_groups: Sequence[Group], source: Source, own_of: Sequence[int], order: Sequence[int]
) -> list[int]:
    """The saved group of each of the optimizer's, which must hold the same parameters."""
    partners: list[set[int]] = [set() for _ in own_groups]
    for index, saved in zip(own_of, order, strict=True):
        partners[index].add(source.entries[saved].group)
    found = [min(partner, default=-1) for partner in partners]
    # Groups without parameters belong together in the order in which they come.
    empty = sorted(set(range(len(source.groups))) - set(found))
    for index, partner in enumerate(partners):
        if not partner and empty:
            found[index] = empty.pop(0)
    whole = all(len(partner) <= 1 for partner in partners)
    if not whole or sorted(found) != list(range(len(source.groups))):
        raise CheckpointError(
            f"the file has {len(source.groups)} groups of parameters, divided otherwise than the "
            f"{len(own_groups)} of this optimizer, so their options belong to nobody; build the "
            "optimizer with the same groups"
        )
    return found


def _compare_shapes(
    params: Sequence[Tensor], entries: Sequence[Entry], order: Sequence[int]
) -> None:
    wrong = []
    for position, (param, saved) in enumerate(zip(params, order, strict=True)):
        shape = entries[saved].shape
        if shape is not None and shape != tuple(param.shape):
            wrong.append(
                f"{label(entries[saved], position)}: {shape}, expected {tuple(param.shape)}"
            )
    if wrong:
        raise CheckpointError(
            f"the file is for other parameters: got shapes {listed(wrong)}; build the optimizer "
            "over the model that was saved, with its parameters in the same order"
        )


def _merge(own: Group, saved: Group, index: int, kept: Set[str]) -> dict[str, Any]:
    """Saved options win; those that are not saved, and the ``kept`` ones, stay."""
    merged = {**own, "format_version": FORMAT_VERSION}
    added = ADDED_OPTIONS if "format_version" in saved else {}
    for key, value in {**added, **saved}.items():
        if key not in kept:
            here = own.get(key)
            if isinstance(value, Tensor):
                value = value.to(here.device) if isinstance(here, Tensor) else value
                value = value.clone()
            merged[key] = value
    try:
        check_options(merged)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"group {index} of the file: {error}") from error
    return merged


def _check_views(pairs: Sequence[Pair], groups: Sequence[Group], entries: Sequence[Entry]) -> None:
    """came-pytorch factors the last two dimensions; statistics of one view are not another's."""
    other = []
    for pair, group in zip(pairs, groups, strict=True):
        shape = tuple(pair.param.shape)
        if pair.bits is None:
            continue
        own = plan(shape, factored_view=group["factored_view"])
        if own.buffers != plan(shape, factored_view="last_two").buffers:
            other.append(f"{label(entries[pair.saved], pair.saved)} {shape}")
    if other:
        raise CheckpointError(
            f"came-pytorch factors the last two dimensions, this optimizer chooses another view "
            f"for {listed(other)}, and the statistics of one cannot be made from the other's; "
            'construct the optimizer with factored_view="last_two"'
        )


def dtype_changes(pairs: Sequence[Pair], entries: Sequence[Entry]) -> list[str]:
    """The parameters whose dtype is no longer the one that was saved."""
    found = []
    for pair in pairs:
        saved, now = entries[pair.saved].dtype, dtype_name(pair.param.dtype)
        if saved not in (None, now):
            found.append(f"{label(entries[pair.saved], pair.position)}: {saved} -> {now}")
    return found


def same_option(first: Any, second: Any) -> bool:
    """Whether two values of an option are equal, tensors and numbers told apart."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
    return type(first) is type(second) and bool(first == second)


#: In front of everything: DistributedDataParallel, DataParallel, AveragedModel.
_IN_FRONT = "module"
#: Anywhere: torch.compile, FSDP, activation checkpointing of torch.distributed.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_SHOWN = 5  # parameters that a message lists


def own_names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names of all parameters in order; ``None`` if there are none or two are the same."""
    if not all("param_names" in group for group in groups):
        return None
    names = [name for group in groups for name in group["param_names"]]
    usable = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if usable and len(names) == sum(len(group["params"]) for group in groups) else None


def order_of(own: Sequence[str], saved: Sequence[str]) -> tuple[list[int], list[str]]:
    """The position in ``saved`` of each of ``own``, and which wrappers' words had to be left out.

    Names are compared as they are first, so that a model that has a ``module`` of its own is not
    taken for a wrapped one.

    Raises:
        CheckpointError: they are not the same names; the message lists those that differ.
    """
    wrappers: list[str] = []
    if set(own) != set(saved):
        bare_own, own_words = _without_wrappers(own)
        bare_saved, saved_words = _without_wrappers(saved)
        unique = len(set(bare_own)) == len(own) == len(saved)
        if not unique or set(bare_own) != set(bare_saved):
            raise _others(own, saved)
        wrappers = sorted(own_words ^ saved_words or own_words | saved_words)
        own, saved = bare_own, bare_saved
    where = {name: position for position, name in enumerate(saved)}
    return [where[name] for name in own], wrappers


def _without_wrappers(names: Sequence[str]) -> tuple[list[str], set[str]]:
    """``names`` without what wrappers put into them, and what that was."""
    words = [name.split(".") for name in names]
    found = {f"{word}." for name in words for word in name[:-1] if word in _ANYWHERE}
    words = [[word for word in name[:-1] if word not in _ANYWHERE] + name[-1:] for name in words]
    # This one is around the whole model, so it is in front of all names or a word of the model.
    while words and all(len(name) > 1 and name[0] == _IN_FRONT for name in words):
        found.add(f"{_IN_FRONT}.")
        words = [name[1:] for name in words]
    return [".".join(name) for name in words], found


def _others(own: Sequence[str], saved: Sequence[str]) -> CheckpointError:
    own_set, saved_set = set(own), set(saved)
    missing = [name for name in own if name not in saved_set]
    strangers = [name for name in saved if name not in own_set]
    return CheckpointError(
        "the file is for other parameters: "
        f"not in the file: {listed(missing)}; not in the optimizer: {listed(strangers)}; "
        "build the optimizer over the model that was saved"
    )


def listed(items: Sequence[str]) -> str:
    """The first of ``items``, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(items[:_SHOWN]) or "none") + more
