"""Names of parameters: whether there are usable ones, and which saved one is which.

Wrappers put words of their own into the names of what they wrap: a model that was saved under
``DistributedDataParallel`` or ``torch.compile`` has other names than the bare one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import listed

#: In front of everything: DistributedDataParallel, DataParallel, AveragedModel.
_IN_FRONT = "module"
#: Anywhere: torch.compile, FSDP, activation checkpointing of torch.distributed.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the names of all parameters in order; ``None`` without names that are unique."""
    names: list[Any] = []
    for group in groups:
        own = group.get("param_names")
        if not isinstance(own, (list, tuple)) or len(own) != len(group["params"]):
            return None
        names += own
    return names if all(isinstance(n, str) for n in names) and _unique(names) else None


def order_of(
    own: Sequence[str],
    saved: Sequence[str],
    *,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> tuple[list[int | None], list[str]]:
    """Find the position in ``saved`` of each of ``own``.

    Names are compared as they are first, so that a model that has a ``module`` of its own is not
    taken for a wrapped one.

    Args:
        own: names of the optimizer's parameters.
        saved: names of the saved ones.
        allow_missing: whether some of ``own`` may be missing in ``saved``: ``None`` stands for it.
        allow_unused: whether some of ``saved`` may be left over.

    Returns:
        The positions, and the wrappers' words that had to be left out of the names.

    Raises:
        ValueError: the names differ; the message lists those that do.
    """
    compared, wrappers = (own, saved), []
    if set(own) != set(saved):
        (bare_own, own_words), (bare_saved, saved_words) = map(_without_wrappers, (own, saved))
        if _unique(bare_own) and _unique(bare_saved):
            common = len(set(bare_own) & set(bare_saved))
            if common > len(set(own) & set(saved)):
                compared = (bare_own, bare_saved)
                wrappers = sorted(own_words ^ saved_words or own_words | saved_words)
    where = {name: position for position, name in enumerate(compared[1])}
    order = [where.get(name) for name in compared[0]]
    used = {position for position in order if position is not None}
    missing = [name for name, position in zip(own, order, strict=True) if position is None]
    unused = [name for position, name in enumerate(saved) if position not in used]
    refused = (missing and not allow_missing) or (unused and not allow_unused)
    if refused or (own and saved and not used):
        raise ValueError(
            "the saved state is for other parameters: "
            f"not saved: {listed(missing)}; not in the optimizer: {listed(unused)}. Build the "
            "optimizer over the model that was saved, or pass allow_missing=True or "
            "allow_unused=True to load what both have"
        )
    return order, wrappers


def _without_wrappers(names: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return ``names`` without what wrappers put into them, and what that was."""
    words = [name.split(".") for name in names]
    found = {f"{word}." for name in words for word in name[:-1] if word in _ANYWHERE}
    words = [[word for word in name[:-1] if word not in _ANYWHERE] + name[-1:] for name in words]
    # This one is around the whole model, so it is in front of all names or a word of the model.
    while words and all(len(name) > 1 and name[0] == _IN_FRONT for name in words):
        found.add(f"{_IN_FRONT}.")
        words = [name[1:] for name in words]
    return [".".join(name) for name in words], found


def _unique(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)
