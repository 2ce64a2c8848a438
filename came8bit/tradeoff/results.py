"""The folder of a study: locked while it runs, and read back when it goes on."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..atomic_file import atomic_file
from .study import Study
from .train import RunResult

#: Raised when the meaning of results.json changes.
SCHEMA = 2

#: What a study leaves in its folder.
FILES = ("results.json", "runs.csv", "report.md", "tradeoff.png")

CSV_COLUMNS = (
    *("purpose", "task", "optimizer", "seed", "lr", "status", "loss", "accuracy"),
    *("bytes_per_parameter", "state_bytes", "parameters", "peak_memory"),
    *("optimizer_ms_p20", "optimizer_ms_p50", "optimizer_ms_p80"),
    *("step_ms_p20", "step_ms_p50", "step_ms_p80", "seconds", "cpu_seconds"),
    *("device", "processes", "came8bit", "git", "error"),
)

_LOCK = ".lock"


class Folder:
    """A folder of results, for one study at a time; use it as a context manager.

    Raises:
        ValueError: If another study writes to it, it cannot be made or written to, or one of its
            files is something else than a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __enter__(self) -> Folder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / _LOCK)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"--out {self.path}: cannot be written: {reason}") from error
        if self._lock is None:
            raise ValueError(
                f"--out {self.path}: another study is writing to this folder. Wait for it, or give "
                f"another --out"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            if sys.platform != "win32":  # there, an open file cannot be removed
                os.unlink(self.path / _LOCK)
            os.close(self._lock)
            self._lock = None

    def read(self, study: Study) -> list[RunResult]:
        """Return the runs of an earlier study with this study's configuration and data.

        Runs that failed, other than by diverging, are left out: they are worth another try. Empty
        if there are no results, or those of another configuration.

        Raises:
            ValueError: If there is a results.json that cannot be read.
        """
        path = self.path / FILES[0]
        if not os.path.lexists(path):
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["schema"], content.get("fingerprint")) != (SCHEMA, fingerprint(study)):
                return []
            runs = [RunResult.from_dict(row) for row in content["runs"]]
            study.seconds = float(content["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Use --fresh to set it "
                f"aside, or another --out"
            ) from error
        return [run for run in runs if run.status == "ok" or run.diverged]

    def set_aside(self) -> Path | None:
        """Move results into a folder inside this one, named by their age; None without any."""
        results = self.path / FILES[0]
        if not os.path.lexists(results):
            return None
        made = datetime.datetime.fromtimestamp(os.lstat(results).st_mtime)
        earlier, number = self.path / f"earlier-{made:%Y%m%d-%H%M%S}", 1
        while earlier.exists():
            number += 1
            earlier = earlier.with_name(f"earlier-{made:%Y%m%d-%H%M%S}-{number}")
        earlier.mkdir()
        for name in FILES:
            if os.path.lexists(self.path / name):
                (self.path / name).rename(earlier / name)
        return earlier

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all."""
        path = self.path / name
        if path.is_symlink():
            path.unlink()  # what it points to does not belong to the study
        raw = content.encode() if isinstance(content, str) else content
        with atomic_file(path, len(raw)) as file:
            file.write(raw)

    def save(self, study: Study) -> None:
        """Write results.json and runs.csv."""
        self.write("results.json", as_json(study))
        self.write("runs.csv", as_csv(study))


def _locked(path: Path) -> int | None:
    """Return a descriptor of the locked file, or None if another process has locked it.

    The system releases the lock with the process, however that ends.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The study before may have removed the file between the two calls.
            if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        os.close(descriptor)


def fingerprint(study: Study) -> str:
    """Return a hash of what two studies must share for their runs to be compared.

    Optimizers, seeds and learning rates are not in it: they tell the runs of one study apart.
    """
    facts = {
        "tasks": [asdict(task) for task in study.tasks()],
        "data": {task: about["sha256"] for task, about in study.about.data.items()},
        "versions": {k: v for k, v in study.about.versions.items() if k != "matplotlib"},
        "run": [study.config.mixed_precision, study.about.device, study.about.isolated],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def as_json(study: Study) -> str:
    """Return all of the study, one line per run; NaN becomes null, because JSON has none."""
    head = {
        "schema": SCHEMA,
        "fingerprint": fingerprint(study),
        "state": study.state,
        "done_runs": study.done,
        "planned_runs": study.planned,
        "seconds": study.seconds,
        "config": study.config.as_dict(),
        **asdict(study.about),
        "skipped": study.skipped,
    }
    rows = ",\n".join(json.dumps(_without_nan(run.as_dict())) for run in study.runs)
    return json.dumps(_without_nan(head), indent=1)[:-2] + f',\n "runs": [\n{rows}\n ]\n}}\n'


def as_csv(study: Study) -> str:
    """Return one row per run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in study.runs:
        row = run.as_dict() | {"came8bit": study.about.versions.get("came8bit")}
        for name in ("optimizer_ms", "step_ms"):
            row.update({f"{name}_{q}": ms and round(ms, 4) for q, ms in row[name].items()})
        writer.writerow(row)
    return text.getvalue()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
