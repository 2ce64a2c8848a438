"""Writes the results so that a file is either the old one or the new one, never half of either."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import CliError
from .study import Study
from .train import RunResult

#: Raised when the meaning of results.json changes.
SCHEMA = 1

#: What a study leaves in its folder.
FILES = ("results.json", "runs.csv", "report.md", "tradeoff.png")

CSV_COLUMNS = (
    "purpose",
    "task",
    "optimizer",
    "seed",
    "lr",
    "status",
    "loss",
    "accuracy",
    "bytes_per_parameter",
    "state_bytes",
    "parameters",
    "peak_memory",
    "optimizer_ms_p20",
    "optimizer_ms_p50",
    "optimizer_ms_p80",
    "step_ms_p20",
    "step_ms_p50",
    "step_ms_p80",
    "seconds",
    "device",
    "processes",
    "came8bit",
    "git",
    "error",
)


def prepare_folder(folder: Path) -> Path | None:
    """Make the folder; move results that it holds into a folder inside it, named by their age.

    Returns:
        Where earlier results went, or None if there were none.

    Raises:
        CliError: If the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
        results = folder / FILES[0]
        if not results.exists():
            return None
        made = datetime.datetime.fromtimestamp(results.stat().st_mtime)
        earlier = folder / f"earlier-{made:%Y%m%d-%H%M%S}"
        earlier.mkdir()
        for name in FILES:
            if (folder / name).exists():
                (folder / name).rename(earlier / name)
    except OSError as error:
        raise CliError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
    return earlier


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a neighbouring file and rename it over ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    raw = content.encode() if isinstance(content, str) else content
    with open(temporary, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(study: Study, folder: Path) -> None:
    """Write results.json and runs.csv."""
    write_atomically(folder / "results.json", json.dumps(as_json(study), indent=1) + "\n")
    write_atomically(folder / "runs.csv", as_csv(study))


def as_json(study: Study) -> dict[str, Any]:
    """Return all of the study as plain data; NaN becomes null, because JSON has none."""
    content = {
        "schema": SCHEMA,
        "state": study.state,
        "planned_runs": study.planned,
        "seconds": study.seconds,
        "config": study.config.as_dict(),
        **study.about,
        "skipped": study.skipped,
        "runs": [run.as_dict() for run in study.runs],
    }
    plain: dict[str, Any] = _without_nan(content)
    return plain


def as_csv(study: Study) -> str:
    """Return one row per run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in study.runs:
        writer.writerow(_row(run, study.about))
    return text.getvalue()


def _row(run: RunResult, about: dict[str, Any]) -> dict[str, Any]:
    values = run.as_dict()
    values["came8bit"] = about.get("versions", {}).get("came8bit")
    values["git"] = about.get("git")
    for name in ("optimizer_ms", "step_ms"):
        values.update({f"{name}_{q}": round(ms, 4) for q, ms in values[name].items()})
    return {column: values.get(column) for column in CSV_COLUMNS}


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
