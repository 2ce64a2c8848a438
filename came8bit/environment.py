"""What this machine and this installation are: versions, hardware, the state of the source tree."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import came8bit

#: Packages whose versions belong to a result, by their names on PyPI.
PACKAGES = (
    "torch",
    "came-pytorch",
    "bitsandbytes",
    "accelerate",
    "transformers",
    "matplotlib",
    "numpy",
)


def package_version(name: str) -> str | None:
    """Return the installed version of the PyPI package ``name``, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Imported from a source tree that was never installed.
        return getattr(came8bit, "__version__", None) if name == "came8bit" else None


def versions() -> dict[str, str | None]:
    """Return the versions of came8bit, Python and :data:`PACKAGES`; None: not installed."""
    found: dict[str, str | None] = {
        "came8bit": package_version("came8bit"),
        "python": platform.python_version(),
    }
    found.update({name: package_version(name) for name in PACKAGES})
    found["torch"] = str(torch.__version__)  # with its +cpu or +cu130
    found["cuda"] = torch.version.cuda
    return found


def hardware() -> dict[str, Any]:
    """Describe the processor, memory and GPUs. Sizes are in bytes."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory": properties.total_memory})
    return {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": total_memory(),
        "gpus": gpus,
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int | None:
    """Return the bytes of physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def kernels() -> dict[str, dict[str, Any]]:
    """Return per compiled library whether it is loaded, whence, for what and, if not, why."""
    status = came8bit.kernel_status()
    return {name: dataclasses.asdict(getattr(status, name)) for name in ("cpu", "cuda")}


def git_revision() -> str | None:
    """Return the commit of the source tree came8bit is imported from, marked if files are changed.

    None if it is not imported from a git checkout of its own.
    """
    folder = Path(came8bit.__file__).resolve().parent
    # An installed package may lie in an environment inside some other checkout: not that one's.
    if not (folder.parent / "pyproject.toml").is_file():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    answers = []
    for command in commands:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def terminal(**options: Any) -> Any:
    """Return a ``rich`` console that leaves a closed pipe to :func:`came8bit.cli.main`.

    Args:
        options: of ``rich.console.Console``.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError that is being handled

    return Terminal(**options)
