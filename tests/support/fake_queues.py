"""A device that does everything as late, or in as odd an order, as its events allow.

Nothing that is put into a queue happens until somebody waits for it. Then the queues are worked
off by a policy: of the operations whose queue they head and whose events have happened, the policy
chooses. An ordering that no event demands will be broken by one policy or another, and the bits
will be wrong.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from came8bit.ops import step as stepping

QUEUES = ("compute", "h2d", "d2h")


class Event:
    def __init__(self) -> None:
        self.happened = False


class FakeQueues:
    """:class:`came8bit.paging.transfer.Streams` over CPU memory.

    Args:
        policy: names of queues, the preferred one first, or a number to seed a random choice.
        ignore: ``(queue, number)`` of a wait that is left out, to see that it matters.
    """

    def __init__(self, policy: object = 0, ignore: tuple[str, int] | None = None) -> None:
        self.policy = policy
        self.random = random.Random(policy) if isinstance(policy, int) else None
        self.ignore = ignore
        self.queues: dict[str, deque] = {queue: deque() for queue in QUEUES}
        self.waits = dict.fromkeys(QUEUES, 0)
        self.trace: list[str] = []
        self.allocated = 0
        self.host_waits = 0

    # --- the protocol -----------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Tensor:
        self.allocated = nbytes
        return torch.full((nbytes,), 0x55, dtype=torch.uint8)

    def copy(self, queue: str, target: Tensor, source: Tensor) -> None:
        self.trace.append(f"copy {queue}")
        self.queues[queue].append(lambda: target.copy_(source))

    def record(self, queue: str) -> Event:
        event = Event()
        self.queues[queue].append(lambda: setattr(event, "happened", True))
        return event

    def wait(self, queue: str, event: Event) -> None:
        self.waits[queue] += 1
        if self.ignore != (queue, self.waits[queue] - 1):
            self.queues[queue].append(event)

    def done(self, event: Event) -> bool:
        return event.happened

    def synchronize(self, event: Event) -> None:
        self.host_waits += not event.happened
        self.work_until(lambda: event.happened)

    # --- the device -------------------------------------------------------------------------------

    def launch(self, function: Callable[[], None]) -> None:
        """Put a computation into its queue."""
        self.trace.append("compute")
        self.queues["compute"].append(function)

    def _ready(self) -> list[str]:
        ready = []
        for name, queue in self.queues.items():
            while queue and isinstance(queue[0], Event) and queue[0].happened:
                queue.popleft()
            if queue and not isinstance(queue[0], Event):
                ready.append(name)
        return ready

    def work_until(self, satisfied: Callable[[], bool]) -> None:
        while not satisfied():
            ready = self._ready()
            assert ready, "the queues wait for each other"
            if self.random is not None:
                name = self.random.choice(ready)
            else:
                name = min(ready, key=list(self.policy).index)
            self.queues[name].popleft()()

    def drain(self) -> None:
        """What torch.cuda.synchronize does."""
        self.work_until(lambda: not self._ready() and not any(self.queues.values()))


@contextmanager
def operators_on(queues: FakeQueues) -> Iterator[None]:
    """Let operators that the step loop calls wait in the compute queue."""

    class Deferred:
        def __getattr__(self, name: str) -> object:
            operator = getattr(kept, name)

            def call(*, grads: list, **rest: object) -> None:
                # A kernel reads sizes and numbers when it is launched, tensors when it runs.
                grads = [grad.clone() for grad in grads]
                queues.launch(lambda: operator(grads=grads, **rest))

            return call

    kept = stepping.schema
    stepping.schema = Deferred()
    try:
        yield
    finally:
        stepping.schema = kept
