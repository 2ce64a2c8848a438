"""What the parts of the GPU report share: how programs are run, and what is kept of them."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG_END = 30_000
"""Characters of a log that are kept."""

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


@dataclass
class Part:
    """One part of the report and how it ended."""

    name: str
    limit: float
    """Seconds it may take."""
    status: str = NOT_RUN
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def end(self, status: str, *lines: str) -> None:
        """Say how it ended; the first failure counts."""
        if self.status != FAILED:
            self.status = status
        self.lines += [line for line in lines if line]


@dataclass
class Report:
    """What all parts share."""

    out: Path
    dry: bool
    deadline: float
    """On the clock of ``time.monotonic()``."""
    wheels: Path
    work: Path
    """Builds, unpacked wheels and whole logs."""
    parts: list[Part] = field(default_factory=list)

    @property
    def site(self) -> Path:
        """Where the wheels are installed."""
        return self.work / "site"

    def environment(self) -> dict[str, str]:
        """For the programs of all parts: this source tree, the wheels, the kernels required."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CAME8BIT_")}
        path = [str(ROOT), str(self.site), kept.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        kept["PYTHONUNBUFFERED"] = "1"
        kept["CAME8BIT_REQUIRE_KERNELS"] = "1" if self.dry else "cuda"
        kept["CAME8BIT_GIT"] = revision()
        return kept

    def run(self, part: Part, command: list[str], log: str, **variables: str) -> int | None:
        """Run ``command``, its output into the end of ``log``; None: it ran out of time."""
        left = min(part.limit - part.seconds, self.deadline - time.monotonic())
        print(f"    {' '.join(command)}", flush=True)
        begin = time.monotonic()
        kept = self.work / log
        with kept.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                status: int | None = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**self.environment(), **variables},
                    timeout=max(1.0, left),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                file.write(f"\nstopped after {left:.0f} s\n")
                status = None
            except OSError as error:
                file.write(f"{error}\n")
                status = 127
        part.seconds += time.monotonic() - begin
        text = kept.read_text(encoding="utf-8", errors="replace")
        (self.out / log).write_text(text[-LOG_END:], encoding="utf-8")
        return status


def revision() -> str:
    """Return the commit of these sources, or what CAME8BIT_GIT says of a copy without git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or os.environ.get("CAME8BIT_GIT", "unknown")


def tail(path: Path, lines: int = 12) -> str:
    """Return the last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def first_line(command: list[str]) -> str:
    """Return the most telling line that a program prints about itself, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if "release" in line or "Version" in line]
    return (telling or lines or ["none"])[0].strip()
