"""What all tests share: hypothesis profiles, the number of threads, and that the kernels are there.

A run without the compiled kernels would test the reference against itself. So it is refused, unless
one of the package's variables asks for it: ``CAME8BIT_DISABLE_KERNELS=1``, ``CAME8BIT_PURE=1`` or
``CAME8BIT_REQUIRE_KERNELS=0``. Then the tests marked ``kernels`` are skipped, and say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from strategies import kernel_isas

from came8bit.ops import libraries

# No deadlines: shared machines stall. Other numbers of examples are for the command line:
# HYPOTHESIS_PROFILE=thorough make test ARGS="-k kernels".
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "ci", deadline=None, suppress_health_check=_SLOW, derandomize=True, print_blob=True
)
settings.register_profile("thorough", deadline=None, suppress_health_check=_SLOW, max_examples=1000)
# Of the GPU report: no search for smaller examples, which may take minutes.
settings.register_profile(
    "gpu",
    deadline=None,
    suppress_health_check=_SLOW,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)

# As many threads as OMP_NUM_THREADS says, or two: enough to be parallel, and no more than the
# smallest machine has.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 2)
torch.set_num_threads(THREADS)


def pytest_configure(config: pytest.Config) -> None:
    """Register marks, and refuse to run without the kernels where nobody asked for that."""
    config.addinivalue_line("markers", "kernels: tests the compiled kernels, not the reference")
    status = libraries.status().cpu
    asked = any(libraries.flag(f"CAME8BIT_{name}") for name in ("DISABLE_KERNELS", "PURE"))
    required = os.environ.get("CAME8BIT_REQUIRE_KERNELS", "")
    asked = asked or (required != "" and not libraries.flag("CAME8BIT_REQUIRE_KERNELS"))
    if not status.loaded and not asked:
        raise pytest.UsageError(
            f"came8bit's compiled CPU kernels are not loaded: {status.reason}. Without them the "
            "tests would compare the reference with itself; CAME8BIT_REQUIRE_KERNELS=0 runs them "
            "all the same"
        )


def pytest_report_header() -> str:
    status = libraries.status().cpu
    what = f"{status.path}, {status.isa}" if status.loaded else f"none ({status.reason})"
    return f"came8bit kernels: {what}; torch {torch.__version__}, {THREADS} threads"


def pytest_runtest_setup(item: pytest.Item) -> None:
    status = libraries.status().cpu
    if item.get_closest_marker("kernels") and not status.loaded:
        pytest.skip(f"asked to run without the kernels: {status.reason}")


@pytest.fixture(params=kernel_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set in turn; ``restored`` puts the old one back."""
    name: str = request.param
    libraries.set_cpu_isa(name)
    return name


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Instruction set and number of threads as they were before the test."""
    threads = torch.get_num_threads()
    name = libraries.cpu_isa() if libraries.status().cpu.loaded else None
    yield
    torch.set_num_threads(threads)
    if name is not None:
        libraries.set_cpu_isa(name)
