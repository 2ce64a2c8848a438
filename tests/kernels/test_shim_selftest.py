"""The shim that runs CUDA kernels on a CPU, by toy kernels: it computes what a GPU would, and it
notices mistakes that a GPU would make something of, or nothing, depending on the day.

What needs no sanitizer runs in this process; the rest in one process for each sanitizer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch
from shim.build import ADDRESS, HERE, PLAIN, THREAD, UCONTEXT, Build, run_python
from shim.control import ORDERS
from shim.selftest import THREADS, SelfTest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")

RIGHT = ["sum", "transpose", "rotate", "exchange", "through global"]
"""Kernels without a mistake; ``SelfTest.check`` knows what comes out."""

WRONG_RESULT = [
    "sum without barrier",
    "transpose without barrier",
    "rotate without second barrier",
    "exchange without syncwarp",
    "through global without barrier",
]
"""Their mistake shows in the result under at least one order of the threads."""

STUCK = {
    "barrier in a branch": r"threads 0-63 wait at __syncthreads in selftest.cu:\d+, threads 64-127 "
    r"have returned",
    "two barriers": r"threads 0-63 wait at __syncthreads in selftest.cu:\d+, threads 64-127 wait "
    r"at __syncthreads",
    "shuffle in a branch": r"threads 0-15 wait in a warp shuffle with mask 0xffffffff",
    "shuffle from outside": r"lane \d+ reads from lane \d+, which its mask leaves out",
    "mask without itself": r"lane \d+ is not in its own mask",
}

RACES = [*WRONG_RESULT, "sum without fence", "exchange after shuffle", "blocks write one place"]
"""Races, some of which never change a result here."""


@pytest.fixture(scope="module", params=[PLAIN, UCONTEXT], ids=lambda build: build.name)
def selftest(request: pytest.FixtureRequest) -> SelfTest:
    """Both ways to switch between fibers."""
    return SelfTest(request.param.make("_C_selftest"))


@pytest.fixture(autouse=True)
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "selftest" in request.fixturenames:
        request.getfixturevalue("selftest").control.configure()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("workers", [1, 4])
def test_kernels_without_a_mistake(selftest: SelfTest, order: str, workers: int) -> None:
    for seed in range(3):
        selftest.control.configure(order=order, workers=workers, seed=seed)
        assert [kernel for kernel in RIGHT if not selftest.check(kernel)] == []


@pytest.mark.parametrize("kernel", WRONG_RESULT)
def test_a_missing_barrier_changes_the_result(selftest: SelfTest, kernel: str) -> None:
    results = {}
    for order in ORDERS:
        selftest.control.configure(order=order)
        results[order] = selftest.check(kernel)
    assert False in results.values(), results


@pytest.mark.parametrize("kernel", STUCK)
def test_threads_that_do_not_meet(selftest: SelfTest, kernel: str) -> None:
    """An error that names the place, in every order; the next launch works."""
    for order in ORDERS:
        selftest.control.configure(order=order)
        with pytest.raises(RuntimeError, match=STUCK[kernel]):
            selftest.check(kernel)
        assert selftest.check("transpose")


def test_intrinsics(selftest: SelfTest) -> None:
    out = selftest.run("intrinsics", torch.zeros(1), torch.zeros(20, 32), threads=32)
    lanes = range(32)
    expected = [
        [50] * 32,
        [lane // 8 * 80 + (lane + 3) % 8 * 10 for lane in lanes],
        [lane ^ 9 for lane in lanes],
        [lane & ~8 for lane in lanes],  # the segment above is out of reach
        [min(lane + 4, lane if lane >= 28 else 31) for lane in lanes],
        [lane if lane % 16 >= 12 else lane + 4 for lane in lanes],
        [lane if lane < 4 else lane - 4 for lane in lanes],
        [lane ^ 1 for lane in lanes],
        [11] * 32,
        [1] * 32,
        [0] * 32,
        [131] * 32,
        [496] * 32,
        [lane ^ 1 if lane < 8 else -1 for lane in lanes],
        [(lane & -lane).bit_length() + 3 if lane else 0 for lane in lanes],
        *[[value] * 32 for value in (1, 3, 1, 1, 1)],
    ]
    assert out.int().tolist() == expected


def test_whole_numbers_as_a_gpu_finds_them(selftest: SelfTest) -> None:
    """``whole`` of update.h has another formula there; its arguments are -1 to 2**22."""
    exact = torch.arange(0, 2**22 + 1, 37, dtype=torch.float32)
    around = [torch.nextafter(exact, torch.tensor(limit)) for limit in (-1.0, 2.0**23)]
    x = torch.cat([exact, *around, exact[:-1] + 0.5, -torch.rand(1000)])
    out = selftest.run("whole", x, torch.zeros(len(x)), n=len(x), blocks=-(-len(x) // THREADS))
    assert torch.equal(out, x.trunc())


def test_shared_memory_starts_as_garbage(selftest: SelfTest) -> None:
    for garbage, expected in ((0xFF, None), (0x7F, 3.39615136e38)):
        selftest.control.configure(garbage=garbage)
        for _ in range(2):  # the second time after a block that left zeros behind
            out = selftest.run("uninitialised", torch.zeros(1), torch.zeros(THREADS))
            assert out[:7].tolist() == [0.0] * 7
            assert out[8:].tolist() == [0.0] * (THREADS - 8)
            value = float(out[7])
            assert value != value if expected is None else value == pytest.approx(expected)


def test_blocks_run_at_the_same_time(selftest: SelfTest) -> None:
    """Each waits for all others: with one block at a time this would not come back."""
    for order in ORDERS:
        selftest.control.configure(workers=4, order=order)
        selftest.control.launches()
        out = selftest.run("blocks meet", torch.zeros(1), torch.zeros(4), blocks=4)
        assert out.tolist() == [1.0] * 4
        (launch,) = selftest.control.launches()
        assert (launch.blocks, launch.threads, launch.at_once) == (4, THREADS, 4)


def test_some_blocks_only(selftest: SelfTest) -> None:
    selftest.control.configure(head=1, tail=2)
    out = torch.full((8, THREADS), -1.0)
    x = torch.ones(8 * THREADS)
    selftest.run("sum", x, out.flatten()[: 7 + 2], n=len(x), blocks=8)
    assert (out.flatten()[:8] >= 0).tolist() == [True, *[False] * 5, True, True]


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_launches_that_a_gpu_refuses(selftest: SelfTest, blocks: int, threads: int) -> None:
    with pytest.raises(RuntimeError, match=f"refuses a launch of {blocks} blocks of {threads}"):
        selftest.run("sum", torch.zeros(9), torch.zeros(9), blocks=blocks, threads=threads)


def test_settings_that_make_no_sense(selftest: SelfTest) -> None:
    for changes in ({"workers": 0}, {"l2_bytes": 0}, {"garbage": 256}, {"tail": -1}):
        with pytest.raises(ValueError, match="refuses"):
            selftest.control.configure(**changes)


# --- in a process of its own ----------------------------------------------------------------------


def outcome(build: Build, *kernels: str) -> tuple[int, dict[str, str]]:
    """Status of a process that runs ``kernels``, and what it wrote to stderr during each."""
    library = build.make("_C_selftest")
    done = run_python(build, HERE / "selftest.py", library, *kernels, keep_going=True)
    parts = re.split(r"^== (.*) ==$", done.stderr, flags=re.MULTILINE)
    return done.returncode, dict(zip(parts[1::2], parts[2::2], strict=True))


def test_races_are_reported() -> None:
    status, said = outcome(THREAD, *RIGHT, *RACES)
    assert status == 66
    assert list(said) == [*RIGHT, *RACES]
    reported = {kernel for kernel, text in said.items() if "ThreadSanitizer: data race" in text}
    assert reported == set(RACES)
    assert re.search(r"sum<true, false>.*selftest.cu:\d+", said["sum without fence"])


@pytest.mark.parametrize(
    ("build", "kernel", "expected"),
    [
        (ADDRESS, "beyond global", "AddressSanitizer: heap-buffer-overflow"),
        (ADDRESS, "transpose", None),
        (PLAIN, "beyond shared", "index 128 out of bounds for type 'float"),
        (PLAIN, "misaligned", "misaligned address"),
    ],
)
def test_stray_accesses_end_the_process(build: Build, kernel: str, expected: str | None) -> None:
    status, said = outcome(build, kernel)
    if expected is None:
        assert status == 0, said
    else:
        assert status == 66, said
        assert expected in said[kernel]
