"""State that is not on its device: pages of many parameters, brought in for a step and back.

:class:`Pager` joins the parts: backing stores (:mod:`.pages`) and, per device, a planner with what
carries out its plans (:class:`DevicePages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.rungs import momentum_shape
from ..state import store
from ..state.layout import Layout
from .page_file import PageFile
from .pages import (
    BackingStore,
    Page,
    PageLayout,
    PinnedMemory,
    Placement,
    default_budget,
    page_layout,
    read_pieces,
    write_pieces,
)
from .pages import resident_buffers as resident
from .schedule import FREE, STAGE, WAIT, WRITE_BACK, Event, Schedule
from .transfer import Transfer, transfer_for


class Pager:
    """The pages of an optimizer.

    What is not paged, small states and statistics, never comes here: the methods that return
    *resident* state return what belongs into ``optimizer.state``.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._pages: dict[Tensor, Page] = {}
        self._by_device: dict[torch.device, DevicePages] = {}
        self._file: PageFile | None = None
        self._pinned: PinnedMemory | None = None
        self._order: list[Tensor] = []  # set by set_order()
        self._count = 0

    def __contains__(self, param: Tensor) -> bool:
        return param in self._pages

    # --- making and removing pages ----------------------------------------------------------------

    def reserve(self, wanted: Iterable[tuple[Tensor, Layout]]) -> None:
        """Make the pages that parameters need, zero; those that have the right one keep it.

        Raises:
            OSError, MemoryError: no room; then nothing has been made.
            NotImplementedError: neither CPU nor CUDA.
        """
        missing: dict[torch.device, list[tuple[Tensor, PageLayout]]] = {}
        superfluous = []
        for param, layout in wanted:
            page, needed = self._pages.get(param), page_layout(layout)
            if page is not None and page.layout != needed:
                superfluous.append(param)
            if needed is not None and (page is None or page.layout != needed):
                missing.setdefault(param.device, []).append((param, needed))
        fresh: list[tuple[DevicePages, list[tuple[Tensor, Page]]]] = []
        for device, members in missing.items():
            try:
                lane = self._device_pages(device)
                addresses = lane.backing.reserve([needed.nbytes for _, needed in members])
            except BaseException:
                for other, new in fresh:
                    for _, page in new:
                        other.backing.release(page.address, page.nbytes)
                raise
            new = []
            for (param, needed), address in zip(members, addresses, strict=True):
                self._count += 1
                new.append((param, Page(self._count, device, needed, address)))
            fresh.append((lane, new))
        for param in superfluous:
            self.drop(param)
        for lane, new in fresh:
            lane.add(page for _, page in new)
            self._pages.update(new)

    def drop(self, param: Tensor) -> None:
        """Forget the page of ``param``, if it has one."""
        page = self._pages.get(param)
        if page is not None:
            self._by_device[page.device].remove(page)
            del self._pages[param]

    def drop_others(self, params: Iterable[Tensor]) -> None:
        """Forget the pages of all parameters but ``params``."""
        wanted = set(params)
        for param in [param for param in self._pages if param not in wanted]:
            self.drop(param)

    def shape(self, param: Tensor) -> torch.Size | None:
        """Return the shape of the parameter that the page of ``param`` was made for, if any."""
        page = self._pages.get(param)
        if page is None:
            return None
        return momentum_shape({b.name: b for b in page.layout.buffers}, param.shape)

    def _device_pages(self, device: torch.device) -> DevicePages:
        if device not in self._by_device:
            backing = self._backing(device)
            self._by_device[device] = DevicePages(
                device, backing, transfer_for(device, backing), self.placement.budget
            )
        return self._by_device[device]

    def _backing(self, device: torch.device) -> BackingStore:
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"paged state is for parameters on the CPU and on CUDA devices, got {device}; "
                "use the optimizer that is not paged"
            )
        if device.type == "cpu" or self.placement.directory is not None:
            self._file = self._file or PageFile(self.placement.directory)
            return self._file
        self._pinned = self._pinned or PinnedMemory()
        return self._pinned

    # --- state of one parameter -------------------------------------------------------------------

    def allocate(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Make state of ``param``, whose page has been reserved; return the resident part."""
        page = self._pages.get(param)
        if page is not None:
            self._by_device[page.device].clear(page)
        return store.allocate(resident(layout, page.layout if page else None), param.device)

    def read(self, param: Tensor) -> dict[str, Tensor]:
        """Return the paged buffers of ``param``, in a file or pinned memory; valid for one step."""
        page = self._pages.get(param)
        return self._by_device[page.device].read(page) if page is not None else {}

    def write(self, param: Tensor, layout: Layout, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Replace the state of ``param``, whose page has been reserved; the resident part.

        ``state`` is not aliased; tensors may be on any device, counters may be integers.
        """
        page = self._pages.get(param)
        if page is not None:
            self._by_device[page.device].write(page, state)
        return store.copy(state, resident(layout, page.layout if page else None), param.device)

    # --- a step -----------------------------------------------------------------------------------

    def usable(self) -> bool:
        """Return whether all pages are where they were."""
        try:
            for lane in self._by_device.values():
                lane.backing.check()
        except OSError:
            return False
        return True

    def set_order(self, params: Iterable[Tensor]) -> None:
        """Prefetch in this order from now on; with an empty one, in that of each step."""
        self._order = list(params)
        self._expect(self._order, again=False)

    def check(self, params: Iterable[Tensor]) -> None:
        """Refuse everything that can be refused before ``params`` are visited.

        That includes pages of other parameters that are lost. Pages of those that have moved to
        another device follow them.

        Raises:
            OSError, MemoryError, ValueError: pages are gone, or the budget is too small.
        """
        for lane in self._by_device.values():
            if lane.pages:
                lane.backing.check()
        pages = {param: self._pages[param] for param in params if param in self._pages}
        for param, page in pages.items():
            if page.device != param.device:
                self._move(param, page)
        for device in {param.device for param in pages}:
            self._by_device[device].plan()

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Be ready to visit ``params``, after a :meth:`check` of them.

        Raises:
            OSError, MemoryError, ValueError: as :meth:`check`.
        """
        self.check(params)
        if self._order and len(params) < 2:
            # A step in backward comes here for every parameter: look at all pages only if needed.
            if any(lane.order is not self._order for lane in self._by_device.values()):
                self._expect(self._order, again=False)
        elif params:
            self._expect(params, again=True)

    def visit(self, params: Sequence[Tensor], run: Run) -> None:
        """Call ``run`` with the paged buffers of ``params``, as many at a time as may be.

        Args:
            params: prepared ones that have pages.
            run: gets a list of positions in ``params`` and their buffers, changes the latter in
                place, and keeps no reference to them.
        """
        by_lane: dict[torch.device, list[tuple[int, Page]]] = {}
        for number, param in enumerate(params):
            page = self._pages[param]
            by_lane.setdefault(page.device, []).append((number, page))
        for device, members in by_lane.items():
            self._by_device[device].use(members, run)

    def flush(self) -> None:
        """Finish what the last step has left under way and can be finished without waiting."""
        for lane in self._by_device.values():
            lane.transfer.flush()

    def _expect(self, params: Sequence[Tensor], again: bool) -> None:
        for device, lane in self._by_device.items():
            pages = [self._pages[param] for param in params if param in self._pages]
            lane.expect(params, [page.key for page in pages if page.device == device], again)

    def _move(self, param: Tensor, page: Page) -> None:
        lane = self._device_pages(param.device)
        (address,) = lane.backing.reserve([page.nbytes])
        self._count += 1
        new = Page(self._count, param.device, page.layout, address)
        old = self._by_device[page.device]
        lane.write(new, old.read(page))
        old.remove(page)
        lane.add([new])
        self._pages[param] = new


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
