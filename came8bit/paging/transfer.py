"""How pages get to where they are used and back: what carries out a :class:`~.schedule.Schedule`.

:class:`MappedTransfer` is for parameters in CPU memory: a page is mapped from its file while it is
used. :class:`StreamTransfer` is for parameters on a device: a page is copied to and from device
memory, on streams of its own. Both do what the events of a schedule say, one method each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .page_file import PageFile
from .pages import BackingStore, Page, pinned_staging, readable
from .schedule import PAGES_IN_GROUP


class Transfer(Protocol):
    """Carries out events; for the meaning of each see :mod:`came8bit.paging.schedule`.

    Attributes:
        reuse_blocks_host: :meth:`free` may let the host wait.
    """

    reuse_blocks_host: bool

    def prepare(self, capacity: int, at_once: int) -> None:
        """Get what a schedule of ``capacity`` needs, ``at_once`` bytes of it in use together."""

    def stage(self, page: Page, offset: int) -> None:
        """Begin to bring ``page`` to ``offset``."""

    def wait(self, page: Page, offset: int) -> Tensor:
        """Return the bytes of ``page`` for computing; drop them before the next call."""

    def write_back(self, page: Page, offset: int) -> None:
        """Begin to write ``page`` back."""

    def free(self, page: Page) -> None:
        """Prepare the place of ``page`` for other pages."""

    def synchronize(self, page: Page) -> None:
        """Wait until the host may read and write the backing store of ``page``."""

    def flush(self) -> None:
        """Finish what can be finished without waiting."""


class MappedTransfer:
    """Maps a page while it is used, or for good where it is kept; ``offset`` plays no part.

    Writing back is the system's, behind the mapping; it is visible to every later mapping at once.
    """

    reuse_blocks_host = False

    def __init__(self, backing: PageFile) -> None:
        self._backing = backing
        self._open: dict[int, Tensor] = {}

    def prepare(self, capacity: int, at_once: int) -> None:
        """As :meth:`Transfer.prepare`.

        Raises:
            OSError: the system would not map so much.
        """
        self._backing.probe(at_once - sum(window.numel() for window in self._open.values()))

    def stage(self, page: Page, offset: int) -> None:
        """As :meth:`Transfer.stage`: the system reads ahead; no address space is taken yet."""
        self._backing.will_need(page.address, page.nbytes)

    def wait(self, page: Page, offset: int) -> Tensor:
        """As :meth:`Transfer.wait`."""
        window = self._open.pop(page.key, None)
        if window is None:
            (window,) = self._backing.pieces(page.address, page.nbytes)
        self._open[page.key] = window
        if len(self._open) > PAGES_IN_GROUP:  # the one that was not used for longest
            del self._open[next(iter(self._open))]
        return window

    def write_back(self, page: Page, offset: int) -> None:
        """As :meth:`Transfer.write_back`."""
        self._open.pop(page.key, None)

    def free(self, page: Page) -> None:
        """As :meth:`Transfer.free`."""
        self._open.pop(page.key, None)

    def synchronize(self, page: Page) -> None:
        """Do nothing: mappings of a file always agree."""

    def flush(self) -> None:
        """Do nothing: no work is left."""


class Streams(Protocol):
    """What a device does one after the other: ``"compute"``, and copies ``"h2d"`` and ``"d2h"``."""

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate bytes on the device that all queues may use."""

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """Add a copy to ``queue``."""

    def record(self, queue: str) -> Any:
        """Return an event that happens when everything now in ``queue`` is done."""

    def wait(self, queue: str, event: Any) -> None:
        """Let what is added to ``queue`` from now on come after ``event``."""

    def done(self, event: Any) -> bool:
        """Return whether ``event`` has happened."""

    def synchronize(self, event: Any) -> None:
        """Let the host wait for ``event``."""


class CudaStreams:
    """Two streams beside the current one of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {queue: torch.cuda.Stream(device) for queue in ("h2d", "d2h")}

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return self._side.get(queue) or torch.cuda.current_stream(self._device)

    def _on(self, queue: str) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream(queue))

    def allocate(self, nbytes: int) -> Tensor:
        """As :meth:`Streams.allocate`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        for stream in self._side.values():
            # What used these bytes before, on the current stream, may not be done with them; and
            # they must not go to others before the copies are done.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            memory.record_stream(stream)
        return memory

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        """As :meth:`Streams.copy`."""
        with self._on(queue):
            target.copy_(source, non_blocking=True)

    def record(self, queue: str) -> torch.cuda.Event:
        """As :meth:`Streams.record`."""
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: torch.cuda.Event) -> None:
        """As :meth:`Streams.wait`."""
        self._stream(queue).wait_event(event)

    def done(self, event: torch.cuda.Event) -> bool:
        """As :meth:`Streams.done`."""
        return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        """As :meth:`Streams.synchronize`."""
        event.synchronize()


class StreamTransfer:
    """Copies pages between their backing store and one piece of device memory.

    The host never waits, with one exception. A device cannot read a file on its own: there, pages
    pass through pinned memory that mirrors the device's, and the host copies between that and the
    file. Before it reuses a page's place there, it waits until the page has arrived: one that was
    used at least two groups ago, if the order was expected.

    Args:
        queues: of the device.
        backing: of the pages.
        staging: gives pinned memory if ``backing`` is not pinned itself.
    """

    def __init__(
        self, queues: Streams, backing: BackingStore, staging: Callable[[int], Tensor] | None = None
    ) -> None:
        self._queues = queues
        self._backing = backing
        self._staging_memory = staging
        self.reuse_blocks_host = staging is not None
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._staging: Tensor | None = None
        self._last: dict[int, Any] = {}  # page -> the event after its last copy
        self._behind: dict[int, tuple[Page, int]] = {}  # pages that the file does not have yet

    def prepare(self, capacity: int, at_once: int) -> None:
        """As :meth:`Transfer.prepare`.

        Raises:
            MemoryError: the device has no room, or the host refuses to pin memory.
        """
        if self._arena.numel() == capacity:
            return
        self._staging = self._arena = torch.empty(0, dtype=torch.uint8)  # make room first
        self._staging = self._staging_memory(capacity) if self._staging_memory else None
        try:
            self._arena = self._queues.allocate(capacity)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"paged state: wanted {readable(capacity)} of device memory for pages, which the "
                f"device does not have ({str(error).splitlines()[0]}). Lower page_budget="
            ) from error

    def stage(self, page: Page, offset: int) -> None:
        """As :meth:`Transfer.stage`."""
        queues, flat = self._queues, self._arena[offset : offset + page.nbytes]
        # Nothing to wait for: if the page was here before, its last copy came before its free().
        if self._staging is not None:
            pieces = [self._staging[offset : offset + page.nbytes]]
            pieces[0].copy_(self._window(page))
        else:
            pieces = self._backing.pieces(page.address, page.nbytes)
        for target, source in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            queues.copy("h2d", target, source)
        self._last[page.key] = queues.record("h2d")

    def wait(self, page: Page, offset: int) -> Tensor:
        """As :meth:`Transfer.wait`."""
        self._queues.wait("compute", self._last[page.key])
        return self._arena[offset : offset + page.nbytes]

    def write_back(self, page: Page, offset: int) -> None:
        """As :meth:`Transfer.write_back`."""
        queues, flat = self._queues, self._arena[offset : offset + page.nbytes]
        if self._staging is not None:
            pieces = [self._staging[offset : offset + page.nbytes]]
            self._behind[page.key] = page, offset
        else:
            pieces = self._backing.pieces(page.address, page.nbytes)
        queues.wait("d2h", queues.record("compute"))
        for source, target in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            queues.copy("d2h", target, source)
        self._last[page.key] = queues.record("d2h")

    def free(self, page: Page) -> None:
        """As :meth:`Transfer.free`."""
        if page.key not in self._last:
            return
        if self._staging is not None:
            self.synchronize(page)
        else:
            self._queues.wait("h2d", self._last[page.key])

    def synchronize(self, page: Page) -> None:
        """As :meth:`Transfer.synchronize`."""
        if page.key in self._last:
            self._queues.synchronize(self._last[page.key])
        self._write_file(page.key)

    def flush(self) -> None:
        """As :meth:`Transfer.flush`."""
        for key in list(self._behind):
            if self._queues.done(self._last[key]):
                self._write_file(key)

    def _write_file(self, key: int) -> None:
        if key in self._behind and self._staging is not None:
            page, offset = self._behind[key]
            self._window(page).copy_(self._staging[offset : offset + page.nbytes])
            del self._behind[key]

    def _window(self, page: Page) -> Tensor:
        (window,) = self._backing.pieces(page.address, page.nbytes)
        return window


def transfer_for(device: torch.device, backing: BackingStore) -> Transfer:
    """Return what moves the pages of parameters on ``device`` from and to ``backing``."""
    if isinstance(backing, PageFile):
        return (
            StreamTransfer(CudaStreams(device), backing, pinned_staging)
            if device.type == "cuda"
            else MappedTransfer(backing)
        )
    return StreamTransfer(CudaStreams(device), backing)
