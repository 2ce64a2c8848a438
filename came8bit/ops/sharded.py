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
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from ..reference import sums_sizes, work_size
from ..state.layout import Group, plan_state
from ..state.sharding import Shard, is_sharded, local, shard_of
from ..state.store import StateStore, StepItem, Work, may_train
from . import schema
from .step import Call, calls_of, is_new, is_still, step_group

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


def moving(work: Work, groups: Sequence[Group]) -> list[Sequence[StepItem]]:
    """Return, for each group, the items that are more than an occasion to make state.

    Tools that save or shard state before training (``get_optimizer_state_dict``) take a step with
    gradients of zero and a learning rate of 0. It must not count as the first, which bias
    correction and the statistics would remember. A gradient that is zero here may be another on
    another rank, as that of an embedding is: all ranks look.

    Args:
        work, groups: as those of :func:`step_sharded`.
    """
    found = _any_gradients(work, groups)

    def moves(item: StepItem) -> bool:
        if not is_new(item):
            return True
        return found[item.position] if is_split(item.param) else bool(item.grad.any())

    return [
        [item for item in items if moves(item)] if is_still(group) else items
        for group, items in work
    ]


def _any_gradients(work: Work, groups: Sequence[Group]) -> dict[int, bool]:
    """Return, by position, whether the gradient of a split parameter is not zero on some rank.

    Of those that may train at a learning rate of 0, and are new. Others take part, so that ranks
    cannot disagree about the size.
    """
    if not any(is_still(group) for group in groups or [group for group, _ in work]):
        return {}
    items = {item.position: item for _, items in work for item in items if is_split(item.param)}
    owners = {item.position: group for group, items in work for item in items}
    flags: dict[Any, dict[int, Tensor]] = {}
    for group, position, param in _candidates(groups, items, owners):
        if is_still(group):
            shard, item = shard_of(param), items.get(position)
            grad = item.grad if item is not None and is_new(item) else None
            none = local(param).new_zeros((), dtype=torch.bool)
            here = none if grad is None else local(grad).any()
            if here.device.type != shard.mesh.device_type:
                here = here.to(shard.mesh.device_type)
            flags.setdefault(shard.mesh.get_group(shard.dim), {})[position] = here
    found: dict[int, bool] = {}
    for ranks, by_position in flags.items():
        total = torch.stack(list(by_position.values())).to(torch.int32)
        torch.distributed.all_reduce(total, group=ranks)
        found.update(zip(by_position, map(bool, total.tolist()), strict=True))
    return found


def step_work(
    work: Work, groups: Sequence[Group], store: StateStore, squares: dict[int, Tensor]
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
    work: Work, groups: Sequence[Group], store: StateStore, squares: dict[int, Tensor]
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
    # Two passes change nothing but counters of skips. Unless a sum has to be looked at first, the
    # second is queued before the host waits, so that the device never does.
    strict = any(group["nonfinite"] == "raise" for group, _ in work)
    for number in range(_PASSES):
        for step in steps:
            step.sum_up(number)
        faults = [step.gradients_fault() for step in steps] if number == (not strict) else []
        for fault in (*faults, *(step.sums_fault(number) for step in steps)):
            if fault is not None:
                for step in steps:
                    step.uncount_skips()
                raise fault
    for step in steps:
        step.run(_PASSES)
        squares.update(step.squares())


def _candidates(
    groups: Sequence[Group], items: dict[int, StepItem], owners: dict[int, Group]
) -> Iterator[tuple[Group, int, Tensor]]:
    """Yield the split parameters that may train, with their group and position."""
    if not groups:
        for position, item in items.items():
            yield owners[position], position, item.param if item.sharded is None else item.sharded
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
        flags = len(self._members) if number == 0 else 0
        bucket = torch.zeros(sum(sizes) + flags, dtype=torch.float64, device=self._device)
        sums, has_gradient = bucket.split([sum(sizes), flags])
        self._sums.append(list(sums.split(sizes)))
        self.run(number)
        if flags:
            first = 0
            for has_none, found in groupby(member.item is None for member in self._members):
                count = len(list(found))
                has_gradient[first : first + count] = float(not has_none)  # no copy to wait for
                first += count
        if bucket.numel() and self._count > 1:
            # With parameters on the CPU and ranks on GPUs, this waits: CPU kernels read the sums.
            moved = bucket.to(self._way)
            torch.distributed.all_reduce(moved, group=self._ranks)
            bucket.copy_(moved)
        if flags:
            self._has_gradient = has_gradient.to("cpu", non_blocking=True)  # pinned
            self._copied = None if bucket.device.type == "cpu" else torch.Event(bucket.device)
            if self._copied is not None:
                self._copied.record()

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

    def gradients_fault(self) -> Exception | None:
        """Return the same error on every rank if a parameter has a gradient on some only."""
        if self._copied is not None:  # wait: the error has to come before anything has changed
            self._copied.synchronize()
        some = [
            f"{member.position} (shape {member.shard.shape})"
            for member, count in zip(self._members, self._has_gradient.tolist(), strict=True)
            if count not in (0, self._count)
        ]
        if not some:
            return None
        return RuntimeError(
            f"parameter {', '.join(some)} has a gradient on some ranks only; nothing has been "
            "changed. Let every rank run the same modules, or set the gradients to zero"
        )

    def uncount_skips(self) -> None:
        """Take back what the second pass has counted, if it has run."""
        if len(self._sums) < 2:
            return
        for member, sums in zip(self._members, self._sums[0], strict=True):
            if member.item is not None and member.group["nonfinite"] != "propagate":
                member.item.state["skipped"] -= 1 - sums[0].to(torch.float32).isfinite().long()

    def sums_fault(self, number: int) -> Exception | None:
        """Return the same error on every rank if a sum is not finite and its group wants one."""
        strict = [
            (member, sums[0])
            for member, sums in zip(self._members, self._sums[number], strict=True)
            if member.item is not None and member.group["nonfinite"] == "raise"
        ]
        if number >= _PASSES - 1 or not strict:
            return None  # and do not wait
        finite = torch.stack([total for _, total in strict]).to(torch.float32).isfinite().tolist()
        bad = [
            f"{member.position} (shape {member.shard.shape})"
            for (member, _), good in zip(strict, finite, strict=True)
            if not good
        ]
        if not bad:
            return None
        what = "gradient" if number == 0 else "preconditioned gradient"
        return FloatingPointError(
            f"the {what} of parameter {', '.join(bad)} is not finite; nothing has been "
            'changed. nonfinite="skip" would leave such parameters out of the step'
        )


def _work(item: StepItem) -> Tensor:
    b = n = k = 0
    if "exp_avg_sq_row" in item.state:
        (b, n), k = item.state["exp_avg_sq_row"].shape, item.state["exp_avg_sq_col"].shape[1]
    return torch.empty(work_size(b, n, k), dtype=torch.float32, device=item.param.device)
