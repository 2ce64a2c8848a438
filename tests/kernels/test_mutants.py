"""The tests of the CUDA kernels notice mistakes: a copy of the sources gets one at a time, and the
comparison with the reference, or a sanitizer, has to object. Without a mistake it must not.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue

import pytest
from shim.mutants import CAUGHT, MUTANTS, Mutant, Workshop, borrowed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")

Outcome = tuple[int, str]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Future[Outcome]]:
    """What becomes of each mutant, two at a time; "" and "large" have no mistake."""
    plain: Queue[Workshop] = Queue()
    plain.put(Workshop("0"))
    plain.put(Workshop("1"))
    thread: Queue[Workshop] = Queue()
    thread.put(Workshop("thread", sanitizer="thread"))

    def check(mutant: Mutant) -> Outcome:
        with borrowed(thread if mutant.sanitizer else plain) as workshop:
            return workshop.check(mutant, *mutant.checks)

    def check_without(*arguments: str) -> Outcome:
        with borrowed(plain) as workshop:
            return workshop.check(None, *arguments)

    with ThreadPoolExecutor(2) as pool:
        futures = {
            "": pool.submit(check_without, "--order", "forward", "backward"),
            "large": pool.submit(check_without, "--large"),
        }
        for mutant in MUTANTS:
            futures[mutant.name] = pool.submit(check, mutant)
    return futures


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(outcomes: dict[str, Future[Outcome]], mutant: Mutant) -> None:
    status, said = outcomes[mutant.name].result()
    assert status in CAUGHT, f"{mutant.name}: status {status}\n{said}"


@pytest.mark.parametrize("name", ["", "large"])
def test_no_mistake_passes(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    status, said = outcomes[name].result()
    assert status == 0, said


def test_names_are_different() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
