"""A pytest plugin for tests on a GPU: a worker that has lost the device makes room for another."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest


def device_lost() -> str:
    """Return why every further use of the GPU would fail in this process, or ''."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except torch.OutOfMemoryError:
        return ""
    except RuntimeError as error:
        return str(error).splitlines()[0][:300]
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> Generator[None, None, None]:
    """End a worker that has lost the device, once its result is on the way."""
    lost = device_lost() if report.failed and "PYTEST_XDIST_WORKER" in os.environ else ""
    if lost:
        report.sections.append(("device lost", lost))
    yield
    if lost:
        os._exit(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: Sequence[str]) -> None:
    """Note what there is to run, so that what was not reached can be told."""
    if path := os.environ.get("GPU_REPORT_COLLECTED"):
        Path(path).write_text("\n".join(ids), encoding="utf-8")
