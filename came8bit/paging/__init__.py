"""The store of paged state: what a parameter's page holds is elsewhere, the rest is at hand.

Behind it :mod:`.pager` joins :mod:`.pages` and :mod:`.page_file`, which keep the bytes,
:mod:`.schedule`, which says what is where and when, and :mod:`.transfer`, which moves it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import explaining
from ..reference.rungs import momentum_shape
from ..state.layout import Group, Layout, possible_layouts
from ..state.store import (
    DenseStore,
    Run,
    Saved,
    StateStore,
    StepItem,
    Work,
    fit,
    follow_devices,
    fresh_items,
    may_train,
    missing_layouts,
)
from .pager import Pager
from .pages import Placement, check_paging

_UNCHANGED = "Nothing has been changed"
_HALF_LOADED = "A part of the state has been replaced: load again before the next step"


class PagedStore:
    """Keeps large buffers in pages outside the device, and brings them in for a step.

    Methods are those of :class:`~came8bit.state.store.StateStore`. ``state`` has what stays on the
    device: statistics, counters, and parameters too small for a page.
    """

    takes_sharded = False

    def __init__(self, placement: Placement) -> None:
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self.pager = Pager(placement)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pager.placement,)

    def shape_of(self, param: Tensor) -> torch.Size | None:
        """Return the shape that the state of ``param`` was made for, None if it is incomplete."""
        state = self.state.get(param) or {}
        return momentum_shape(state, param.shape) if "exp_avg" in state else self.pager.shape(param)

    def drop_others(self, params: Iterable[Tensor]) -> None:
        """Free the pages of parameters that are neither in ``params`` nor in ``state``."""
        self.pager.drop_others(chain(self.state, params))

    def reserve(self, groups: Sequence[Group]) -> None:
        """Make the pages of every parameter of ``groups`` that has no state, all or none."""
        self.pager.reserve(missing_layouts(groups, self.state))

    def check(self, groups: Sequence[Group]) -> None:
        """Make and check the pages of all parameters that a step may reach, before it reaches any.

        Raises:
            OSError, MemoryError, ValueError, NotImplementedError: as an ordinary step.
        """
        members = [param for group in groups for param in group["params"]]
        self.drop_others(members)
        self.reserve(groups)
        self.pager.check(filter(may_train, members))

    def prepare(self, work: Work, groups: Sequence[Group]) -> None:
        """Make missing state, check all pages, and start to bring in those of ``work``."""
        fresh = fresh_items(work)
        if fresh:
            self.reserve(groups)
        for item, layout in fresh:
            item.state.update(self.pager.allocate(item.param, layout))
        items = [item for _, members in work for item in members]
        if items:
            self.pager.prepare([item.param for item in items if "exp_avg" not in item.state])
            follow_devices(items)
        for item, _ in fresh:
            self.state[item.param] = item.state

    def visit(self, items: Sequence[StepItem], run: Run) -> None:
        """Call ``run`` with what is at hand, then with each lot of pages that are in together."""
        run([item for item in items if "exp_avg" in item.state])
        paged = [item for item in items if "exp_avg" not in item.state]

        def run_lot(lot: Sequence[tuple[int, dict[str, Tensor]]]) -> None:
            complete = []
            for number, buffers in lot:
                item = paged[number]
                complete.append(replace(item, state={**item.state, **buffers}))
            run(complete)

        if paged:
            self.pager.visit([item.param for item in paged], run_lot)

    def set_prefetch_order(self, params: Iterable[Tensor]) -> None:
        """Prefetch in this order in every step; with an empty one, in each step's own."""
        self.pager.set_order(params)

    def flush(self) -> None:
        """Finish what the last step has left under way and can be finished without waiting."""
        self.pager.flush()

    def read(self, param: Tensor) -> dict[str, Tensor]:
        """Return the complete state of ``param``, empty before its first step.

        Paged buffers are a window of the page file or in pinned memory, whatever device ``param``
        is on, and good until the next step or the next :meth:`write` of ``param``.
        """
        state: dict[str, Tensor] = self.state.get(param) or {}
        if not state or "exp_avg" in state:
            return state
        return {**self.pager.read(param), **state}

    def write(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Replace the state of ``param`` by a copy of ``state``, which may be on any device."""
        if state:
            layout = fit(state, possible_layouts(param.shape))
            self.pager.reserve([(param, layout)])
            state = self.pager.write(param, layout, state)
        self.state[param] = state

    def replace_all(self, saved: Iterable[Saved]) -> None:
        """Replace all state by copies of ``saved``, in new pages if the old ones are lost."""
        saved = list(saved)
        pager = self.pager if self.pager.usable() else Pager(self.pager.placement)
        wanted: list[tuple[Tensor, Layout]] = [(param, layout) for param, layout, _ in saved]
        with explaining(_UNCHANGED):
            pager.reserve(wanted)
        state: defaultdict[Any, Any] = defaultdict(dict)
        with explaining(_HALF_LOADED if pager is self.pager else _UNCHANGED):
            for param, layout, tensors in saved:
                state[param] = pager.write(param, layout, tensors)
        pager.drop_others(state)
        self.pager, self.state = pager, state

    def adopt(self, state: Mapping[Any, Any]) -> None:
        """Replace all state by copies of ``state``, complete."""
        self.replace_all(
            Saved(param, fit(saved, possible_layouts(param.shape)), saved)
            for param, saved in state.items()
            if saved
        )

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Let ``state`` have copies of everything, pages included, inside the block."""
        complete: defaultdict[Any, Any] = defaultdict(dict)
        for param, state in self.state.items():
            complete[param] = state
            if isinstance(param, Tensor):
                # The small tensors are copied, too, or later steps would change part of the whole.
                complete[param] = {name: t.clone() for name, t in self.read(param).items()}
        resident, self.state = self.state, complete
        try:
            yield
        finally:
            self.state = resident


def store_for(is_paged: object, page_dir: object, page_budget: object) -> StateStore:
    """Return the store that these options of an optimizer ask for.

    Raises:
        ValueError: one of the three is wrong, or has no effect.
    """
    placement = check_paging(is_paged, page_dir, page_budget)
    return DenseStore() if placement is None else PagedStore(placement)
