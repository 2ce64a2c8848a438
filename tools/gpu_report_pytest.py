"""A pytest plugin that writes down each result at once, whatever becomes of the process.

    GPU_REPORT_RESULTS=results.jsonl pytest -p gpu_report_pytest ...

A line for each test that begins, and one for how it ended. A process that dies, hangs or loses the
device is started again by ``gpu_report_tests.py``: tests that the file knows are then left out.
``GPU_REPORT_SHARD=1/4`` takes every fourth test, from the second on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

HANG_SECONDS = 45.0
"""A test that takes longer ends the process."""
HUNG = 71
"""Its exit status."""
MESSAGE_KEPT = 4000


class Recorder:
    """Writes results; one for the process."""

    def __init__(self, path: Path, shard: tuple[int, int], hang_seconds: float) -> None:
        self._path = path
        self._shard = shard
        self._hang_seconds = hang_seconds
        self._timer: threading.Timer | None = None
        self._begun = 0.0
        self._worst: dict[str, str] = {}
        self._session: pytest.Session | None = None
        self._known = known_tests(path)

    def _write(self, **entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    # --- what is run ------------------------------------------------------------------------------

    def pytest_collection(self, session: pytest.Session) -> None:
        """Before test modules are imported: failing examples are told as they are found."""
        from hypothesis import Phase, settings

        self._session = session
        # Looking for a smaller one may take minutes; another run is to try the same ones.
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile(
            "gpu", settings(), phases=phases, derandomize=True, database=None, deadline=None
        )
        settings.load_profile("gpu")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """This shard's tests that have no result yet."""
        first, step = self._shard
        mine = items[first::step]
        rest = [item for item in mine if item.nodeid not in self._known]
        chosen = set(map(id, rest))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = rest
        if not self._known:
            self._write(collected=len(mine))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be imported is a result, too."""
        if report.failed:
            self._write(test=report.nodeid, outcome="broken", message=_end(report.longreprtext))

    # --- results ----------------------------------------------------------------------------------

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._write(test=nodeid)
        self._begun = time.monotonic()
        self._timer = threading.Timer(self._hang_seconds, self._hung, [nodeid])
        self._timer.daemon = True
        self._timer.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of it is over; the first one that went wrong counts."""
        if report.failed:
            outcome = "failed" if report.when == "call" else "broken"
        elif report.skipped:
            outcome = "skipped"
        else:
            outcome = "passed" if report.when == "teardown" else ""
        if not outcome or report.nodeid in self._worst:
            return
        self._worst[report.nodeid] = outcome
        seconds = round(time.monotonic() - self._begun, 2)
        entry = {"test": report.nodeid, "outcome": outcome, "seconds": seconds}
        if outcome != "passed":
            entry["message"] = _end(report.longreprtext)
        self._write(**entry)
        lost = device_lost() if report.failed else ""
        if lost and self._session is not None:
            self._write(lost=lost)
            self._session.shouldstop = f"the device is lost: {lost}"

    def pytest_runtest_logfinish(self) -> None:
        """A test is over."""
        if self._timer is not None:
            self._timer.cancel()

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Say that nothing is left to do."""
        if exitstatus in (0, 1, 5) and not session.shouldstop:
            self._write(finished=int(exitstatus))

    def _hung(self, nodeid: str) -> None:
        """Of a kernel that does not end, no Python is told: leave it all behind."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "".join(traceback.format_stack(main)[-6:])
        message = f"{where}no end after {self._hang_seconds:g} s"
        self._write(test=nodeid, outcome="hung", seconds=self._hang_seconds, message=message)
        os._exit(HUNG)


def known_tests(path: Path) -> set[str]:
    """Tests that the file names."""
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a process died while it wrote
            found.add(json.loads(line).get("test", ""))
    return found - {""}


def device_lost() -> str:
    """Why every further use of the GPU would fail in this process, or ''."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        return str(error).splitlines()[0][:300] if not _is_shortage(error) else ""
    return ""


def _is_shortage(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _end(text: str) -> str:
    return text[-MESSAGE_KEPT:]


def pytest_configure(config: pytest.Config) -> None:
    """Record where the environment asks for it."""
    path = os.environ.get("GPU_REPORT_RESULTS")
    if path:
        first, _, count = os.environ.get("GPU_REPORT_SHARD", "0/1").partition("/")
        hang = float(os.environ.get("GPU_REPORT_HANG_SECONDS", HANG_SECONDS))
        recorder = Recorder(Path(path), (int(first), int(count)), hang)
        config.pluginmanager.register(recorder, "gpu-report-recorder")
