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
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG_KEPT = 200_000
"""Characters of each log that are kept: half of its beginning, half of its end."""
GRACE = 8.0
"""Seconds in which a program whose time is up may write down what it has."""

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"

ASK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
print(json.dumps(found))
"""
COMPILE = "from adafactor8bit.optimizer import _load_cuda_module as load; assert load()"


@dataclass
class Part:
    """One part of the report and how it ended."""

    name: str
    deadline: float = math.inf
    """On the clock of ``time.monotonic()``."""
    status: str = NOT_RUN
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def end(self, status: str, *lines: str) -> None:
        """Say how it ended; the first failure counts."""
        if self.status != FAILED:
            self.status = status
        self.lines += [line for line in lines if line]

    def left(self) -> float:
        """Return the seconds that it still has."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass
class Report:
    """What all parts share."""

    out: Path
    work: Path
    """Builds, unpacked wheels and whole logs."""
    wheels: Path
    dry: bool = False
    keep: bool = False
    """Whether ``work`` may hold what an earlier run has left."""
    build_for: str = ""
    """Compute capability of a GPU that is not here: only build for it."""
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self.peers = Peers(self)

    @functools.cached_property
    def gpu(self) -> dict[str, str]:
        """What torch says of the GPU, from a process that gives its memory back."""
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
        if done.returncode != 0:
            return {"problem": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
        return {name: str(value) for name, value in json.loads(done.stdout).items()}

    def environment(self) -> dict[str, str]:
        """For the programs of all parts: this source tree, the wheels, the kernels required."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CAME8BIT_")}
        path = [ROOT, ROOT / "tools", self.work / "site", kept.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in path if entry)
        kept["PYTHONUNBUFFERED"] = "1"
        kept["HF_HUB_OFFLINE"] = "1"
        kept["CAME8BIT_REQUIRE_KERNELS"] = "1" if self.dry else "cuda"
        kept["CAME8BIT_GIT"] = revision()
        # What other optimizers compile stays in the work folder, and without a look at the GPU.
        kept["TORCH_EXTENSIONS_DIR"] = str(self.work / "extensions")
        kept["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "inductor")
        if not self.dry and "capability" in self.gpu:
            kept["TORCH_CUDA_ARCH_LIST"] = self.gpu["capability"]
        return kept

    def run(
        self, part: Part, *command: object, seconds: float = math.inf, **variables: str
    ) -> int | None:
        """Run a program with its output in the part's log; return None if it ran out of time."""
        words = [str(word) for word in command]
        with (self.work / f"{part.name}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            try:
                program = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**self.environment(), **variables},
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n")
                return 127
            self._running.append(program)
            within = min(seconds, part.left())
            try:
                return program.wait(None if math.isinf(within) else within)
            except subprocess.TimeoutExpired:
                log.write(f"\nstopped after {within:.0f} s\n")
                return None
            finally:  # also when this program itself is told to end
                end_group(program)

    def stop(self) -> None:
        """End all programs that still run."""
        for program in self._running:
            if program.poll() is None:
                end_group(program)

    def text(self, part: Part) -> str:
        """Return the part's log so far."""
        path = self.work / f"{part.name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def tail(self, part: Part, lines: int = 12) -> str:
        """Return the last lines of the part's log."""
        return "\n".join(self.text(part).splitlines()[-lines:])

    def write(self) -> None:
        """Write what is known so far: a run that is stopped leaves that."""
        parts = [{k: v for k, v in vars(p).items() if k != "deadline"} for p in self.parts]
        content = {"dry_run": self.dry, "git": revision(), "parts": parts}
        logs = [
            f"===== {path.stem}\n{shortened(path.read_text(encoding='utf-8', errors='replace'))}"
            for path in sorted(self.work.glob("*.log"))
        ]
        for name, text in (
            ("report.json", json.dumps(content, indent=1) + "\n"),
            ("report.md", self.markdown()),
            ("logs.txt", "\n".join(logs)),
        ):
            new = self.out / f"{name}.new"
            new.write_text(text, encoding="utf-8")
            new.replace(self.out / name)

    def table(self) -> list[str]:
        """Return how the parts ended."""
        rows = [f"| {part.name} | {part.status} | {part.seconds:.0f} |" for part in self.parts]
        return ["| part | | seconds |", "|---|---|---|", *rows]

    def markdown(self) -> str:
        """Return the report for reading."""
        lines = ["# GPU report" + " (dry run without a GPU)" * self.dry, "", *self.table()]
        for part in self.parts:
            lines += ["", f"## {part.name}: {part.status}", "", "```", *part.lines, "```"]
        return "\n".join(lines) + "\n"


class Peers(threading.Thread):
    """Unpacks the carried wheels beside the build, then has adafactor8bit compile its kernels.

    What is installed already stays as it is. ``unpacked`` is set before the kernels are compiled.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(daemon=True)
        self._report, self._part = report, Part("peers")
        self.unpacked = threading.Event()
        self.lines: list[str] = []

    def run(self) -> None:
        """Leave a line for each wheel."""
        site = self._report.work / "site"
        site.mkdir(exist_ok=True)
        wheels = [
            wheel
            for wheel in sorted(self._report.wheels.glob("*.whl"))
            if not any(distributions(name=wheel.name.split("-")[0], path=[str(site), *sys.path]))
        ]
        # All at once; if one does not fit this Python, one by one.
        bad = [] if self._pip(site, *wheels) else [w for w in wheels if not self._pip(site, w)]
        self.lines = [f"{w.name}: {'NOT ' * (w in bad)}installed" for w in wheels]
        self.lines = self.lines or ["no wheels: only optimizers that are installed"]
        self.unpacked.set()
        if any("adafactor8bit" in wheel.name for wheel in self._report.wheels.glob("*.whl")):
            done = self._python("-c", COMPILE)
            self.lines.append(f"adafactor8bit's kernels: {'' if done else 'NOT '}compiled")

    def _pip(self, site: Path, *wheels: Path) -> bool:
        flags = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--no-input"]
        flags += ["--disable-pip-version-check", "--quiet", "--target", str(site)]
        return not wheels or self._python("-m", "pip", "install", *flags, *wheels)

    def _python(self, *arguments: object) -> bool:
        # Not to be seen on the GPU: tests look at free memory, the benchmark at times.
        return (
            self._report.run(self._part, sys.executable, *arguments, CUDA_VISIBLE_DEVICES="") == 0
        )


def end_group(program: subprocess.Popen[bytes]) -> None:
    """End a program with all that it has started: first ask, so that it can write what it knows."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGINT)
            program.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


@functools.cache
def revision() -> str:
    """Return the commit of these sources, or what CAME8BIT_GIT says of a copy without git."""
    described = first_line("git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--dirty")
    known = not described.startswith(("none", "fatal"))
    return described if known else os.environ.get("CAME8BIT_GIT", "unknown")


def shortened(text: str, kept: int = LOG_KEPT) -> str:
    """Return the beginning and the end of a long text."""
    if len(text) <= kept:
        return text
    half = kept // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def first_line(*command: object) -> str:
    """Return the most telling line that a program prints about itself, or why there is none."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if "release" in line or "Version" in line]
    return (telling or lines or ["none"])[0].strip()
