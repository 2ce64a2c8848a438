"""When pages come and go: a planner without torch, memory or clocks, only numbers.

Memory of the device (the *budget*) has two parts. In the first, as many pages as fit are *kept*:
they are brought once and stay. The second is a *ring* through which the others pass in the order
of their use. If everything fits, all pages are kept and nothing ever moves.

A step uses pages in *groups*, of at most a third of the ring, so that while one group computes, the
next one can arrive and the last one can leave. The planner is told the expected order and
prefetches along it, round and round, as far as the ring has room; it is never wrong to use
another page, that one only comes late.

:class:`Schedule` returns :class:`Event` lists. Their meaning, for the transfer:

``stage``
    copy the page from its backing store to ``offset`` of the device;
``wait``
    computing has to wait for the last copy of this page, in either direction;
``use``
    the step reads and changes the page on the device;
``write_back``
    after what has been computed so far, copy the page to its backing store;
``free``
    the bytes of the page go to other pages: whatever is staged from now on waits for the last
    copy of this page.

None of this asks the host to wait.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STAGE, WAIT, USE, WRITE_BACK, FREE = "stage", "wait", "use", "write_back", "free"

GROUPS_IN_RING = 3  # one arrives, one computes, one leaves
PAGES_IN_GROUP = 64  # a window needs a file descriptor, of which a process has about a thousand


@dataclass(frozen=True)
class Event:
    """Something that happens to ``page``, whose bytes on the device begin at ``offset``."""

    kind: str
    page: int
    offset: int


@dataclass
class _Slot:
    """Bytes of the device that hold a page; ``page`` is None once it has been forgotten.

    ``busy``: its group computes. ``spent``: has been used and written back, so that its bytes
    may be taken at once.
    """

    page: int | None
    offset: int
    size: int
    busy: bool = False
    spent: bool = False


class Schedule:
    """Decides where pages are and what moves next.

    Args:
        sizes: bytes of each page, > 0. Those that come first are the first to be kept.
        budget: bytes of the device that pages may take together.
        reuse_blocks_host: do not prefetch into the place of the group that has just been used. For
            transfers whose ``free`` blocks the host: it then waits for the group before that.

    Attributes:
        capacity: bytes of the device that are used, ``<= budget``.
        kept: pages that stay on the device once they are there.
        at_once: bytes that are in use together, at most.

    Raises:
        ValueError: a page is larger than ``budget``.
    """

    def __init__(
        self, sizes: Mapping[int, int], budget: int, reuse_blocks_host: bool = False
    ) -> None:
        self.sizes = dict(sizes)
        self._patient = reuse_blocks_host
        total, largest = sum(self.sizes.values()), max(self.sizes.values(), default=0)
        if largest > budget:
            raise ValueError(f"a page has {largest} bytes, the budget is {budget}")
        self.kept: dict[int, int] = {}  # page -> offset
        kept_bytes = 0
        least = 0 if total <= budget else min(budget, max(GROUPS_IN_RING * largest, budget // 4))
        for page, size in self.sizes.items():
            if kept_bytes + size <= budget - least:
                self.kept[page] = kept_bytes
                kept_bytes += size
        self._ring_start = kept_bytes
        self._ring_size = 0 if len(self.kept) == len(self.sizes) else budget - kept_bytes
        self.capacity = self._ring_start + self._ring_size
        self._group_limit = self._ring_size // GROUPS_IN_RING
        largest_passing = max(
            (size for page, size in self.sizes.items() if page not in self.kept), default=0
        )
        self.at_once = kept_bytes + max(self._group_limit, largest_passing)
        self._ring: deque[_Slot] = deque()  # the oldest first
        self._slots: dict[int, _Slot] = {}  # every page that is on the device
        self._dirty: set[int] = set()  # kept pages whose backing store is behind
        self._order: list[int] = []
        self._index: dict[int, int] = {}
        self._position = 0

    # --- what the step calls ----------------------------------------------------------------------

    def expect(self, order: Sequence[int]) -> list[Event]:
        """Expect pages in ``order``, again and again, and prefetch the first ones."""
        self._order = [page for page in order if page in self.sizes and page not in self.kept]
        self._index = {page: index for index, page in enumerate(self._order)}
        self._position = 0
        events = self._prefetch()
        for page in order:
            if page in self.kept and page not in self._slots:
                events += self._keep(page)
        return events

    def group_size(self, pages: Sequence[int]) -> int:
        """Return how many of the first ``pages`` can be used together; one at least."""
        ring_bytes = 0
        pages = pages[:PAGES_IN_GROUP]
        for count, page in enumerate(pages):
            ring_bytes += 0 if page in self.kept else self.sizes[page]
            if count and ring_bytes > self._group_limit:
                return count
        return len(pages)

    def begin(self, group: Sequence[int]) -> list[Event]:
        """Return what has to happen before ``group``, at most :meth:`group_size`, is used.

        Every ``begin`` is followed by one :meth:`end` before the next.
        """
        events = self._bring(group)
        for page in group:
            self._slots[page].busy = True
        events += [Event(WAIT, page, self._slots[page].offset) for page in group]
        return events + [Event(USE, page, self._slots[page].offset) for page in group]

    def end(self, group: Sequence[int]) -> list[Event]:
        """Return what has to happen once the computation with ``group`` has been started."""
        events = []
        for page in group:
            slot = self._slots[page]
            slot.busy = False
            if page in self.kept:
                self._dirty.add(page)
            else:
                slot.spent = True
                events.append(Event(WRITE_BACK, page, slot.offset))
        for page in group:
            if page in self._index:
                self._position = self._index[page] + 1
        return events + self._prefetch(group if self._patient else ())

    # --- what others call, between steps ----------------------------------------------------------

    def evict(self, pages: Iterable[int]) -> list[Event]:
        """Bring the backing stores of ``pages`` up to date; they stay where they are."""
        stale = [page for page in pages if page in self._dirty]
        self._dirty.difference_update(stale)
        return [Event(WRITE_BACK, page, self._slots[page].offset) for page in stale]

    def forget(self, page: int) -> list[Event]:
        """Give up what the device has of ``page``: what is backed is about to change or go."""
        self._dirty.discard(page)
        slot = self._slots.pop(page, None)
        if slot is None:
            return []
        slot.page = None
        return [Event(FREE, page, slot.offset)]

    # --- the ring ---------------------------------------------------------------------------------

    def _bring(self, group: Sequence[int]) -> list[Event]:
        """Put every page of ``group`` on the device, whatever has to go for it."""
        events: list[Event] = []
        for page in group:
            if page in self._slots:
                self._slots[page].spent = False
        for page in group:
            if page in self._slots:
                continue
            if page in self.kept:
                events += self._keep(page)
                continue
            placed = self._place(page, distance=-1, protected=group)
            if placed is None:
                # Members are where they leave no room for the others: begin with an empty ring.
                return [*events, *self._empty_ring(), *self._bring(group)]
            events += placed
        return events

    def _prefetch(self, protected: Sequence[int] = ()) -> list[Event]:
        """Stage along the expected order as far as there is room beside ``protected``."""
        events: list[Event] = []
        for distance in range(len(self._order)):
            page = self._order[(self._position + distance) % len(self._order)]
            slot = self._slots.get(page)
            if slot is None:
                placed = self._place(page, distance, protected)
                if placed is None:
                    break
                events += placed
            elif slot.spent:
                slot.spent = False  # still there, and the next to be used again
        return events

    def _distance(self, page: int) -> float:
        """Return how many uses of other pages are expected before that of ``page``."""
        index = self._index.get(page)
        return math.inf if index is None else (index - self._position) % len(self._order)

    def _keep(self, page: int) -> list[Event]:
        slot = self._slots[page] = _Slot(page, self.kept[page], self.sizes[page])
        return [Event(STAGE, page, slot.offset)]

    def _place(self, page: int, distance: int, protected: Sequence[int] = ()) -> list[Event] | None:
        """Stage ``page`` in the ring, freeing what is expected later than at ``distance``."""
        size = self.sizes[page]
        leaving = 0  # this many of the oldest have to go
        while (offset := self._room(size, leaving)) is None:
            oldest = self._ring[leaving]
            if oldest.page is not None:
                wanted = not oldest.spent and self._distance(oldest.page) <= distance
                if wanted or oldest.busy or oldest.page in protected:
                    return None
            leaving += 1
        events = [event for _ in range(leaving) for event in self._pop_oldest()]
        slot = _Slot(page, offset, size)
        self._ring.append(slot)
        self._slots[page] = slot
        return [*events, Event(STAGE, page, offset)]

    def _room(self, size: int, leaving: int) -> int | None:
        """Return where ``size`` bytes fit behind the newest slot without the oldest ``leaving``."""
        start, end = self._ring_start, self._ring_start + self._ring_size
        if leaving == len(self._ring):
            return start
        oldest, newest = self._ring[leaving], self._ring[-1]
        head = newest.offset + newest.size
        if newest.offset < oldest.offset:  # goes round the end
            return head if size <= oldest.offset - head else None
        if size <= end - head:
            return head
        return start if size <= oldest.offset - start else None

    def _pop_oldest(self) -> list[Event]:
        slot = self._ring.popleft()
        if slot.page is None:
            return []
        del self._slots[slot.page]
        return [Event(FREE, slot.page, slot.offset)]

    def _empty_ring(self) -> list[Event]:
        return [event for _ in range(len(self._ring)) for event in self._pop_oldest()]


def trace(
    sizes: Mapping[int, int],
    order: Sequence[int],
    budget: int,
    steps: int = 1,
    reuse_blocks_host: bool = False,
) -> list[Event]:
    """Return all events of ``steps`` steps that use the pages in ``order``, then write back.

    Raises:
        ValueError: a page is larger than ``budget``.
    """
    schedule = Schedule(sizes, budget, reuse_blocks_host)
    events: list[Event] = []
    for _ in range(steps):
        events += schedule.expect(order)
        done = 0
        while done < len(order):
            group = order[done : done + schedule.group_size(order[done:])]
            events += schedule.begin(group)
            events += schedule.end(group)
            done += len(group)
    return events + schedule.evict(order)
