"""How pages get to where they are used and back: the hands of a :class:`~.schedule.Schedule`.

:class:`Windows` is for parameters in CPU memory: a page is mapped from its file while it is used.
:class:`Copies` is for parameters on a device: a page is copied to and from device memory, on queues
of its own.  Both do what the events of a schedule say, one method each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .page_file import PageFile
from .pages import Home, Page, in_words
from .pinned import pinned_bounce
from .schedule import PAGES_IN_GROUP


class Mover(Protocol):
    """Carries out events; for the meaning of each see :mod:`came8bit.paging.schedule`.

    Attributes:
        patient: :meth:`free` may let the host wait.
    """

    patient: bool

    def prepare(self, capacity: int, at_once: int) -> None:
        """Get what a schedule of ``capacity`` needs, ``at_once`` bytes of it in use together."""

    def stage(self, page: Page, offset: int) -> None:
        """Begin to bring ``page`` to ``offset``."""

    def wait(self, page: Page, offset: int) -> Tensor:
        """The bytes of ``page``, for what is computed from now on; drop them before the next."""

    def write_back(self, page: Page, offset: int) -> None:
        """Begin to bring ``page`` home."""

    def free(self, page: Page) -> None:
        """The place of ``page`` is about to be used for others."""

    def settle(self, page: Page) -> None:
        """Wait until the host may read and write the home of ``page``."""

    def flush(self) -> None:
        """Finish what can be finished without waiting."""


class Windows:
    """Maps a page while it is used, or for good where it is kept; ``offset`` plays no part.

    Writing back is the system's, behind the mapping; it is visible to every later mapping at once.
    """

    patient = False

    def __init__(self, home: PageFile) -> None:
        self._home = home
        self._open: dict[int, Tensor] = {}

    def prepare(self, capacity: int, at_once: int) -> None:
        """As :meth:`Mover.prepare`.

        Raises:
            OSError: the system would not map so much.
        """
        self._home.probe(at_once - sum(window.numel() for window in self._open.values()))

    def stage(self, page: Page, offset: int) -> None:
        """As :meth:`Mover.stage`: the system reads ahead; no address space is taken yet."""
        self._home.will_need(page.address, page.nbytes)

    def wait(self, page: Page, offset: int) -> Tensor:
        """As :meth:`Mover.wait`."""
        window = self._open.pop(page.key, None)
        if window is None:
            (window,) = self._home.pieces(page.address, page.nbytes)
        self._open[page.key] = window
        if len(self._open) > PAGES_IN_GROUP:  # the one that was not used for longest
            del self._open[next(iter(self._open))]
        return window

    def write_back(self, page: Page, offset: int) -> None:
        """As :meth:`Mover.write_back`."""
        self._open.pop(page.key, None)

    def free(self, page: Page) -> None:
        """As :meth:`Mover.free`."""
        self._open.pop(page.key, None)

    def settle(self, page: Page) -> None:
        """Mappings of a file always agree."""

    def flush(self) -> None:
        """Nothing is left to do."""


class Queues(Protocol):
    """What a device does one after the other: ``"compute"``, and copies ``"in"`` and ``"out"``."""

    def allocate(self, nbytes: int) -> Tensor:
        """Bytes on the device that all queues may use."""

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """Add a copy to ``queue``."""

    def record(self, queue: str) -> Any:
        """An event that happens when everything now in ``queue`` is done."""

    def wait(self, queue: str, event: Any) -> None:
        """What is added to ``queue`` from now on comes after ``event``."""

    def done(self, event: Any) -> bool:
        """Whether ``event`` has happened."""

    def synchronize(self, event: Any) -> None:
        """Let the host wait for ``event``."""


class CudaQueues:
    """Two streams beside the current one of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {queue: torch.cuda.Stream(device) for queue in ("in", "out")}

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return self._side.get(queue) or torch.cuda.current_stream(self._device)

    def _on(self, queue: str) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream(queue))

    def allocate(self, nbytes: int) -> Tensor:
        """As :meth:`Queues.allocate`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        for stream in self._side.values():
            # What used these bytes before, on the current stream, may not be done with them; and
            # they must not go to others before the copies are done.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            memory.record_stream(stream)
        return memory

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """As :meth:`Queues.copy`."""
        with self._on(queue):
            target.copy_(source, non_blocking=True)

    def record(self, queue: str) -> torch.cuda.Event:
        """As :meth:`Queues.record`."""
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: torch.cuda.Event) -> None:
        """As :meth:`Queues.wait`."""
        self._stream(queue).wait_event(event)

    def done(self, event: torch.cuda.Event) -> bool:
        """As :meth:`Queues.done`."""
        return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        """As :meth:`Queues.synchronize`."""
        event.synchronize()


class Copies:
    """Copies pages between their home and one piece of device memory.

    The host never waits, with one exception.  Where the home is a file, a device cannot read it on
    its own: pages pass through pinned memory that mirrors the device's, and the host copies between
    that and the file.  Before it takes a page's place there for another one, it waits until the
    page has arrived: one that was used at least two groups ago, if the order was expected.

    Args:
        queues: of the device.
        home: of the pages.
        bounce: gives pinned memory if ``home`` is not pinned itself.
    """

    def __init__(
        self, queues: Queues, home: Home, bounce: Callable[[int], Tensor] | None = None
    ) -> None:
        self._queues = queues
        self._home = home
        self._bounce_memory = bounce
        self.patient = bounce is not None
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._bounce: Tensor | None = None
        self._last: dict[int, Any] = {}  # page -> the event after its last copy
        self._behind: dict[int, tuple[Page, int]] = {}  # pages that the file does not have yet

    def prepare(self, capacity: int, at_once: int) -> None:
        """As :meth:`Mover.prepare`.

        Raises:
            MemoryError: the device has no room, or the host refuses to pin memory.
        """
        if self._arena.numel() == capacity:
            return
        self._bounce = self._arena = torch.empty(0, dtype=torch.uint8)  # make room first
        self._bounce = self._bounce_memory(capacity) if self._bounce_memory else None
        try:
            self._arena = self._queues.allocate(capacity)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"paged state: wanted {in_words(capacity)} of device memory for pages, which the "
                f"device does not have ({str(error).splitlines()[0]}). Lower page_budget="
            ) from error

    def stage(self, page: Page, offset: int) -> None:
        """As :meth:`Mover.stage`."""
        queues, flat = self._queues, self._arena[offset : offset + page.nbytes]
        # Nothing to wait for: if the page was here before, its last copy came before its free().
        if self._bounce is not None:
            pieces = [self._bounce[offset : offset + page.nbytes]]
            pieces[0].copy_(self._window(page))
        else:
            pieces = self._home.pieces(page.address, page.nbytes)
        for target, source in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            queues.copy("in", target, source)
        self._last[page.key] = queues.record("in")

    def wait(self, page: Page, offset: int) -> Tensor:
        """As :meth:`Mover.wait`."""
        self._queues.wait("compute", self._last[page.key])
        return self._arena[offset : offset + page.nbytes]

    def write_back(self, page: Page, offset: int) -> None:
        """As :meth:`Mover.write_back`."""
        queues, flat = self._queues, self._arena[offset : offset + page.nbytes]
        if self._bounce is not None:
            pieces = [self._bounce[offset : offset + page.nbytes]]
            self._behind[page.key] = page, offset
        else:
            pieces = self._home.pieces(page.address, page.nbytes)
        queues.wait("out", queues.record("compute"))
        for source, target in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            queues.copy("out", target, source)
        self._last[page.key] = queues.record("out")

    def free(self, page: Page) -> None:
        """As :meth:`Mover.free`."""
        if page.key not in self._last:
            return
        if self._bounce is not None:
            self.settle(page)
        else:
            self._queues.wait("in", self._last[page.key])

    def settle(self, page: Page) -> None:
        """As :meth:`Mover.settle`."""
        if page.key in self._last:
            self._queues.synchronize(self._last[page.key])
        self._write_file(page.key)

    def flush(self) -> None:
        """As :meth:`Mover.flush`."""
        for key in list(self._behind):
            if self._queues.done(self._last[key]):
                self._write_file(key)

    def _write_file(self, key: int) -> None:
        if key in self._behind and self._bounce is not None:
            page, offset = self._behind[key]
            self._window(page).copy_(self._bounce[offset : offset + page.nbytes])
            del self._behind[key]

    def _window(self, page: Page) -> Tensor:
        (window,) = self._home.pieces(page.address, page.nbytes)
        return window


def mover_for(device: torch.device, home: Home) -> Mover:
    """What moves the pages of parameters on ``device`` from and to ``home``."""
    if isinstance(home, PageFile):
        return (
            Copies(CudaQueues(device), home, pinned_bounce)
            if device.type == "cuda"
            else Windows(home)
        )
    return Copies(CudaQueues(device), home)
