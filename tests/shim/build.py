"""Builds the shim's libraries with CMake into ``build/shim``; only what has changed is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CSRC = REPOSITORY / "csrc"
BUILDS = REPOSITORY / "build" / "shim"
JOBS = 2


@dataclass(frozen=True)
class Build:
    """One way to compile: see the options in ``CMakeLists.txt``."""

    name: str
    sanitizer: str = ""
    csrc: Path = CSRC
    few_types: bool = False
    ucontext: bool = False
    folder: Path | None = None

    @property
    def path(self) -> Path:
        """Folder that CMake works in."""
        return self.folder or BUILDS / self.name

    def library(self, target: str) -> Path:
        """Where ``target`` is once it is built."""
        return self.path / f"{target}.so"

    def make(self, target: str) -> Path:
        """Compile what is not up to date and return the path of the library.

        Raises:
            RuntimeError: CMake or the compiler failed; with what they said.
        """
        settings = {
            "CAME8BIT_TORCH_DIR": Path(torch.__file__).resolve().parent,
            "CAME8BIT_CSRC": self.csrc,
            "CAME8BIT_SANITIZER": self.sanitizer,
            "CAME8BIT_FEW_TYPES": int(self.few_types),
            "CAME8BIT_UCONTEXT": int(self.ucontext),
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        run([tool("cmake"), "-G", "Ninja", "-S", HERE, "-B", self.path, *definitions])
        run([tool("cmake"), "--build", self.path, "--target", target, "--parallel", str(JOBS)])
        return self.library(target)


PLAIN = Build("plain")
UCONTEXT = Build("ucontext", ucontext=True)
ADDRESS = Build("address", sanitizer="address", few_types=True)
THREAD = Build("thread", sanitizer="thread", few_types=True)


def tool(name: str) -> str:
    """Path of ``cmake`` or ``ninja``: of this environment, or else of the system."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found: {sys.executable} -m pip install {name}")
    return path


def run(command: list[object]) -> None:
    """Run a command; its output is part of the error if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(str(part) for part in command[:3])
        raise RuntimeError(f"{words} failed:\n{(done.stdout + done.stderr)[-6000:]}")


def run_python(
    build: Build, script: Path, *arguments: object, keep_going: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a Python that can load a library with ``build``'s sanitizer.

    What a sanitizer finds ends the process with status 66, at once or (``keep_going``, for races)
    at its end. The sanitizer has to come first, and Python itself is not to be checked: what it
    never frees is no leak of ours, and memory starts out as NaN so that no one relies on zeros.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", UBSAN_OPTIONS="exitcode=66")
    command = [sys.executable, str(script), *(str(argument) for argument in arguments)]
    if build.sanitizer:
        short = {"address": "asan", "thread": "tsan"}[build.sanitizer]
        compiler = os.environ.get("CXX", "c++")
        found = subprocess.run(
            [compiler, f"-print-file-name=lib{short}.so"],
            capture_output=True,
            text=True,
            check=True,
        )
        common = "exitcode=66:abort_on_error=0:handle_segv=0"
        command = ["env", f"LD_PRELOAD={Path(found.stdout.strip()).resolve()}", *command]
        environment["ASAN_OPTIONS"] = (
            f"{common}:detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
        )
        halt = int(not keep_going)
        environment["TSAN_OPTIONS"] = f"{common}:halt_on_error={halt}:report_signal_unsafe=0"
        # Older race detectors cannot live with addresses as random as newer systems make them.
        fixed = ["setarch", "--addr-no-randomize"]
        if shutil.which(fixed[0]) and subprocess.run([*fixed, "true"], check=False).returncode == 0:
            command = fixed + command
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
