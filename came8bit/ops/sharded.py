"""A step of parameters whose rows are on several ranks.

The passes of all of them run one after another, and between two passes what they have summed up is
added over the ranks: three collectives a step for each set of ranks, however many parameters and
groups there are. The last one carries a number or two of each parameter.

A collective has room for every parameter that may train, with or without a gradient, so that ranks
cannot disagree about its size. A parameter must have a gradient on all ranks or on none, as FSDP2
has it; if not, every rank raises and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from ..reference import sums_sizes, work_size
from ..state.layout import Group, plan_state
from ..state.sharding import Shard, is_sharded, shard_of
from ..state.store import StateStore, StepItem, Work, may_train
from . import schema
from .step import Call, calls_of, step_group

_PASSES = 3  # that have sums


class _Member(NamedTuple):
    """A parameter that may train, and its place among the sums; ``item`` if it has a gradient."""

    group: Group
    position: int
    shard: Shard
    columns: int
    sizes: tuple[int, int, int]
    item: StepItem | None


def is_split(param: Tensor) -> bool:
    """Return whether other ranks have rows of ``param``, or may have."""
    return is_sharded(param) and shard_of(param).dim is not None


def step_work(
    work: Work,
    groups: Sequence[Group],
    store: StateStore,
    squares: dict[int, Tensor],
) -> None:
    """Update the parameters in ``work``, first those that are split between ranks.

    Args:
        work, groups, store: as those of :func:`step_sharded`.
        squares: as that of :func:`~came8bit.ops.step.step_group`; of gradients on all ranks.

    Raises:
        RuntimeError, FloatingPointError: as :func:`step_sharded` and
            :func:`~came8bit.ops.step.step_group`.
    """
    if any(is_sharded(param) for group in groups for param in group["params"]) or not groups:
        step_sharded(work, groups, store, squares)
        work = [
            (group, [item for item in items if not is_split(item.param)]) for group, items in work
        ]
    for group, items in work:
        step_group(group, items, store, squares)


def step_sharded(
    work: Work,
    groups: Sequence[Group],
    store: StateStore,
    squares: dict[int, Tensor],
) -> None:
    """Update the parameters in ``work`` that are split between ranks.

    Args:
        work: of the step; parameters that are not split are left alone.
        groups: all of the optimizer, or those that have something in ``work`` when only these
            parameters take part, on every rank.
        store: of the optimizer.
        squares: as that of :func:`step_work`.

    Raises:
        RuntimeError: a parameter has a gradient on some ranks only; nothing has changed.
        FloatingPointError: ``nonfinite="raise"`` and a gradient is not finite; nothing has changed.
    """
    items: dict[int, StepItem] = {}
    owners: dict[int, Group] = {}
    for group, all_items in work:
        split = [item for item in all_items if is_split(item.param)]
        found: list[StepItem] = []
        if split:
            store.visit(split, found.extend)
        items.update((item.position, item) for item in found)
        owners.update((item.position, group) for item in found)
    members: dict[Any, list[_Member]] = {}
    for group, position, param in _candidates(groups, items, owners):
        shard = shard_of(param)
        layout = plan_state(param, group)
        columns = shard.columns(layout)
        sizes = sums_sizes(columns, bool(group["cautious"]))
        ranks = shard.mesh.get_group(shard.dim)
        member = _Member(group, position, shard, columns, sizes, items.get(position))
        members.setdefault(ranks, []).append(member)
    steps = [_RanksStep(ranks, found) for ranks, found in members.items()]
    for number in range(_PASSES):
        for step in steps:
            step.sum_up(number)
        for step in steps:
            step.check(number)
    for step in steps:
        step.run(_PASSES)
        squares.update(step.squares())


def _candidates(
    groups: Sequence[Group], items: dict[int, StepItem], owners: dict[int, Group]
) -> Iterator[tuple[Group, int, Tensor]]:
    """Yield the split parameters that may train, with their group and position."""
    if not groups:
        for position, item in items.items():
            if item.sharded is not None:
                yield owners[position], position, item.sharded
    position = 0
    for group in groups:
        for param in group["params"]:
            if is_sharded(param) and may_train(param) and param.numel() and is_split(param):
                yield group, position, param
            position += 1


class _RanksStep:
    """The parameters that one set of ranks shares."""

    def __init__(self, ranks: Any, members: Sequence[_Member]) -> None:
        self._ranks, self._members = ranks, members
        self._count = members[0].shard.ranks
        present = [member for member in members if member.item is not None]
        mesh_device = torch.device(members[0].shard.mesh.device_type)
        self._device = present[0].item.param.device if present else mesh_device  # type: ignore[union-attr]
        # The ranks may have no way to add up numbers on the CPU, where offloaded parameters are.
        self._way = self._device if self._device.type == mesh_device.type else mesh_device
        self._calls = list(self._calls_of(present))
        self._sums: list[list[Tensor]] = []

    def _calls_of(self, present: Sequence[_Member]) -> Iterator[tuple[Call, list[int]]]:
        """Yield calls, with the numbers of their members."""
        number = {id(member.item): i for i, member in enumerate(self._members)}
        by_group: dict[int, list[_Member]] = {}
        for member in present:
            by_group.setdefault(id(member.group), []).append(member)
        for found in by_group.values():
            items = [member.item for member in found if member.item is not None]
            for call in calls_of(found[0].group, items):
                places = [number[id(item)] for item in call.items]
                shards = [self._members[i] for i in places]
                rows = [one.shard.shape[0] if one.columns > 0 else 0 for one in shards]
                call.arguments.update(
                    element_offset=[one.shard.offset for one in shards],
                    full_numel=[torch.Size(one.shard.shape).numel() for one in shards],
                    full_rows=rows,
                    work=[_work(item) for item in call.items],
                )
                yield call, places

    def sum_up(self, number: int) -> None:
        """Run a pass, and add what it has summed up over the ranks."""
        sizes = [member.sizes[number] for member in self._members]
        has_gradient = [float(member.item is not None) for member in self._members]
        flags = has_gradient if number == 0 else []
        bucket = torch.zeros(sum(sizes) + len(flags), dtype=torch.float64, device=self._device)
        self._sums.append(list(bucket[: sum(sizes)].split(sizes)))
        self.run(number)
        if flags:
            bucket[sum(sizes) :] = torch.tensor(flags, dtype=torch.float64)
        if bucket.numel() and self._count > 1:
            moved = bucket.to(self._way)
            torch.distributed.all_reduce(moved, group=self._ranks)
            bucket.copy_(moved)
        if flags:
            self._check_gradients(bucket[sum(sizes) :].tolist())

    def run(self, number: int) -> None:
        """Run a pass over what is here."""
        for call, places in self._calls:
            operator = schema.PASSES[call.operator][number]
            if call.by_reference:
                operator = schema.BY_REFERENCE[operator]
            before = [self._sums[number - 1][i] for i in places] if number else []
            after = [self._sums[number][i] for i in places] if number < _PASSES else []
            operator(**call.arguments, **call.scalars, reduced=before, sums=after)
            if number == _PASSES:
                torch.autograd.graph.increment_version(call.arguments["params"])

    def squares(self) -> dict[int, Tensor]:
        """Return the sums of squares of the gradients, by the position of the first of them."""
        found = {
            member.position: sums[0]
            for member, sums in zip(self._members, self._sums[0], strict=True)
            if member.item is not None
        }
        if not found:
            return {}
        return {next(iter(found)): torch.stack(list(found.values())).to(torch.float32)}

    def _check_gradients(self, found: Sequence[float]) -> None:
        some = [
            f"{member.position} (shape {member.shard.shape})"
            for member, count in zip(self._members, found, strict=True)
            if count not in (0, self._count)
        ]
        if some:
            raise RuntimeError(
                f"parameter {', '.join(some)} has a gradient on some ranks only; nothing has been "
                "changed. Let every rank run the same modules, or set the gradients to zero"
            )

    def check(self, number: int) -> None:
        """Raise on every rank if a sum is not finite and its group wants that."""
        if number >= _PASSES - 1:
            return
        bad = [
            f"{member.position} (shape {member.shard.shape})"
            for member, sums in zip(self._members, self._sums[number], strict=True)
            if member.item is not None and member.group["nonfinite"] == "raise"
            if not bool(sums[0].to(torch.float32).isfinite())
        ]
        if bad:
            what = "gradient" if number == 0 else "preconditioned gradient"
            raise FloatingPointError(
                f"the {what} of parameter {', '.join(bad)} is not finite; nothing has been "
                'changed. nonfinite="skip" would leave such parameters out of the step'
            )


def _work(item: StepItem) -> Tensor:
    b = n = k = 0
    if "exp_avg_sq_row" in item.state:
        (b, n), k = item.state["exp_avg_sq_row"].shape, item.state["exp_avg_sq_col"].shape[1]
    return torch.empty(work_size(b, n, k), dtype=torch.float32, device=item.param.device)
