"""The pages of one device: their plan (:mod:`.schedule`) and what carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .pages import BackingStore, Page, read_pieces, write_pieces
from .placement import default_budget
from .schedule import FREE, STAGE, WAIT, WRITE_BACK, Event, Schedule
from .transfer import Transfer

Run = Callable[[Sequence[tuple[int, dict[str, Tensor]]]], None]


class DevicePages:
    """The pages of one device, with their plan and what moves them."""

    def __init__(
        self, device: torch.device, backing: BackingStore, transfer: Transfer, budget: int | None
    ) -> None:
        self.device = device
        self.backing = backing
        self.transfer = transfer
        self.pages: dict[int, Page] = {}
        self._budget = budget
        self._schedule: Schedule | None = None
        self._expected: list[int] | None = None
        self.order: Sequence[Tensor] | None = None  # where `_expected` comes from

    def add(self, pages: Iterable[Page]) -> None:
        """Add pages; the plan is made again before the next use."""
        self.evict_all()
        self.pages.update((page.key, page) for page in pages)

    def remove(self, page: Page) -> None:
        """Give back the place of ``page``."""
        self.evict_all()
        self.transfer.synchronize(page)
        del self.pages[page.key]
        self.backing.release(page.address, page.nbytes)

    def budget(self) -> int:
        """Return the bytes that pages may take.

        Raises:
            ValueError: the user's number is too small for a page.
        """
        sizes = [page.nbytes for page in self.pages.values()]
        if self._budget is None:
            return default_budget(self.device.type, sizes)
        largest = max(self.pages.values(), key=lambda page: page.nbytes)
        if largest.nbytes > self._budget:
            shape = largest.layout.buffers[0].shape
            raise ValueError(
                f"page_budget is {self._budget} bytes, but the state of a parameter of shape "
                f"{tuple(shape)} needs a page of {largest.nbytes}: give page_budget="
                f"{largest.nbytes} or more, three times as much to let copies overlap"
            )
        return self._budget

    def plan(self) -> None:
        """Be ready for :meth:`use`, whose backing store has been checked."""
        schedule = self._schedule
        if schedule is None:
            sizes = {page.key: page.nbytes for page in self.pages.values()}
            schedule = Schedule(sizes, self.budget(), self.transfer.reuse_blocks_host)
        self.transfer.prepare(schedule.capacity, schedule.at_once)
        self._schedule = schedule

    def evict_all(self) -> None:
        """Write all pages back and forget the plan."""
        schedule, self._schedule = self._schedule, None
        self._expected = self.order = None
        if schedule is not None:
            self._do(schedule.evict(self.pages))
            for key in self.pages:
                self._do(schedule.forget(key))

    def expect(self, order: Sequence[Tensor], keys: list[int], again: bool) -> None:
        """Prefetch ``keys``, the pages of ``order``; ``again``: also if that is the old order."""
        if self._schedule is None:
            return
        self.order = order
        if again or keys != self._expected:
            self._expected = keys
            self._do(self._schedule.expect(keys))

    def use(self, members: Sequence[tuple[int, Page]], run: Run) -> None:
        """Call ``run`` with the buffers of ``members``, some at a time, numbers kept."""
        assert self._schedule is not None, "plan() comes first"
        done = 0
        while done < len(members):
            count = self._schedule.group_size([page.key for _, page in members[done:]])
            self._use_group(self._schedule, members[done : done + count], run)
            done += count

    def _use_group(self, schedule: Schedule, group: Sequence[tuple[int, Page]], run: Run) -> None:
        keys = [page.key for _, page in group]
        try:
            flats = self._do(schedule.begin(keys))
        except BaseException:
            self._do(schedule.evict(keys))
            for key in keys:  # the others are as they were in the backing store
                self._do(schedule.forget(key))
            raise
        try:
            # No name here holds the views: a window closes when the last of them is gone.
            run([(number, page.layout.views(flats.pop(page.key))) for number, page in group])
        finally:
            for _, page in group:
                page.zeroed = False
            self._do(schedule.end(keys))

    def _do(self, events: Iterable[Event]) -> dict[int, Tensor]:
        """Carry out ``events``; the bytes of the pages that were waited for."""
        flats = {}
        for event in events:
            page = self.pages[event.page]
            if event.kind == STAGE:
                self.transfer.stage(page, event.offset)
            elif event.kind == WAIT:
                flats[page.key] = self.transfer.wait(page, event.offset)
            elif event.kind == WRITE_BACK:
                self.transfer.write_back(page, event.offset)
            elif event.kind == FREE:
                self.transfer.free(page)
        return flats

    # --- between steps ----------------------------------------------------------------------------

    def read(self, page: Page) -> dict[str, Tensor]:
        """Return the buffers of ``page`` in the backing store, after bringing it up to date."""
        if self._schedule is not None:
            self._do(self._schedule.evict([page.key]))
        self.transfer.synchronize(page)
        return page.layout.views(read_pieces(self.backing.pieces(page.address, page.nbytes)))

    def write(self, page: Page, state: Mapping[str, Tensor]) -> None:
        """Replace the buffers of ``page``."""
        write_pieces(self._pieces(page), page.layout, state)
        page.zeroed = False

    def clear(self, page: Page) -> None:
        """Make all buffers of ``page`` zero."""
        if not page.zeroed:
            for piece in self._pieces(page):
                piece.zero_()
            page.zeroed = True

    def _pieces(self, page: Page) -> list[Tensor]:
        if self._schedule is not None:
            self._do(self._schedule.forget(page.key))
        self.transfer.synchronize(page)
        return self.backing.pieces(page.address, page.nbytes)
