"""Names of parameters: whether there are usable ones, and which saved one is which.

Wrappers put words of their own into the names of what they wrap: a model that was saved under
``DistributedDataParallel`` or ``torch.compile`` has other names than the bare one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .error import CheckpointError

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
