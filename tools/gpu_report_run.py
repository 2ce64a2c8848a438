"""What the parts of the GPU report share: how programs are run, and what is kept of them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LOG_KEPT = 200_000
"""Characters of each log that are kept: half of its beginning, half of its end."""
GRACE = 8.0
"""Seconds in which a program whose time is up may write down what it has."""
MARGIN = 5.0
"""Seconds that are left in the end, to write the report."""

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"

ASK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
    found |= {"l2_bytes": p.L2_cache_size, "multiprocessors": p.multi_processor_count}
print(json.dumps(found))
"""


@dataclass
class Part:
    """One part of the report and how it ended."""

    name: str
    limit: float
    """Seconds that are kept for it."""
    most: float = math.inf
    """Seconds that it may take of what earlier parts have left over."""
    status: str = NOT_RUN
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    begun: float = field(default_factory=time.monotonic)

    def end(self, status: str, *lines: str) -> None:
        """Say how it ended; the first failure counts."""
        if self.status != FAILED:
            self.status = status
        self.lines += [line for line in lines if line]


class Running:
    """A program with a process group of its own, its output in ``log``."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log: IO[str] = log.open("a", encoding="utf-8", errors="replace")
        self._log.write(f"$ {' '.join(command)}\n")
        self._log.flush()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._log.write(f"{error}\n")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Its status; None: its time was up, and nothing of it runs any more."""
        if self._process is None:
            self._log.close()
            return 127
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._log.write(f"\nstopped after {seconds:.0f} s\n")
            return None
        finally:  # also when this program itself is told to end
            if self.alive:
                self.stop()
            self._log.close()

    def stop(self) -> None:
        """End it with all that it has started: first ask, so that it can write what it knows."""
        assert self._process is not None
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(group, signal.SIGINT)
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()


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
    keep: bool = False
    """Whether ``work`` may hold what an earlier run has left."""
    build_for: str = ""
    """A GPU that is not here: only build for it."""
    parts: list[Part] = field(default_factory=list)
    reserved: float = 0.0
    """Seconds that later parts are promised."""
    installing: Running | None = None
    """The program that unpacks the wheels."""
    running: list[Running] = field(default_factory=list)
    """All programs that were started."""

    @property
    def site(self) -> Path:
        """Where the wheels are installed."""
        return self.work / "site"

    @functools.cached_property
    def gpu(self) -> dict[str, str]:
        """What torch says of itself and of the GPU; asked once, since importing it takes long."""
        command = [sys.executable, "-c", ASK]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"problem": str(error)}
        if done.returncode != 0:
            return {"problem": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
        return {name: str(value) for name, value in json.loads(done.stdout).items()}

    def environment(self) -> dict[str, str]:
        """For the programs of all parts: this source tree, the wheels, the kernels required."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CAME8BIT_")}
        path = [str(ROOT), str(ROOT / "tools"), str(self.site), kept.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        kept["PYTHONUNBUFFERED"] = "1"
        kept["HF_HUB_OFFLINE"] = "1"  # nobody is to wait for a network that is not there
        kept["CAME8BIT_REQUIRE_KERNELS"] = "1" if self.dry else "cuda"
        kept["CAME8BIT_GIT"] = revision()
        # What other optimizers compile stays in the work folder, and without a look at the GPU.
        kept["TORCH_EXTENSIONS_DIR"] = str(self.work / "extensions")
        kept["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "inductor")
        if not self.dry and "capability" in self.gpu:
            kept["TORCH_CUDA_ARCH_LIST"] = self.gpu["capability"]
        return kept

    def left(self, part: Part) -> float:
        """Seconds that ``part`` still has: its own, or of what others have left over."""
        now = time.monotonic()
        free = self.deadline - now - MARGIN
        own = part.begun + part.limit - now
        spare = min(free - self.reserved, part.begun + part.most - now)
        return min(free, max(own, spare))

    def start(self, command: list[str], log: str, **variables: str) -> Running:
        """Start ``command``, its output into ``log``."""
        print(f"    {' '.join(command)}", flush=True)
        made = Running(command, self.work / log, {**self.environment(), **variables})
        self.running.append(made)
        return made

    def stop(self) -> None:
        """End all programs that still run."""
        for program in self.running:
            if program.alive:
                program.stop()

    def run(
        self, part: Part, command: list[str], log: str, within: float = math.inf, **variables: str
    ) -> int | None:
        """Run ``command``, its output into ``log``; None: it ran out of time."""
        return self.start(command, log, **variables).wait(min(within, self.left(part)))

    def text(self, log: str) -> str:
        """What a log says so far."""
        path = self.work / log
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def tail(self, log: str, lines: int = 12) -> str:
        """The last lines of a log."""
        return "\n".join(self.text(log).splitlines()[-lines:])


def revision() -> str:
    """Return the commit of these sources, or what CAME8BIT_GIT says of a copy without git."""
    return _described() or os.environ.get("CAME8BIT_GIT", "unknown")


@functools.cache
def _described() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git at all
        return ""
    return done.stdout.strip()


def shortened(text: str, kept: int = LOG_KEPT) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= kept:
        return text
    left_out = len(text) - 2 * (kept // 2)
    return f"{text[: kept // 2]}\n[... {left_out} characters ...]\n{text[-(kept // 2) :]}"


def first_line(command: list[str]) -> str:
    """Return the most telling line that a program prints about itself, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if "release" in line or "Version" in line]
    return (telling or lines or ["none"])[0].strip()
