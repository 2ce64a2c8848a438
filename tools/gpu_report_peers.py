"""Unpack wheels of other optimizers into a folder, then let those that have to compile kernels.

    python tools/gpu_report_peers.py WHEELS SITE

No network, no GPU: whoever starts it hides the GPU. Lines for the report begin with ``--``.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ONLY_IF_MISSING = ("expecttest", "hypothesis", "sortedcontainers")
"""For the tests; others than what is there could be newer than its pytest."""


def say(line: str) -> None:
    """A line for the report."""
    print(f"-- {line}", flush=True)


def pip(wheels: list[Path], site: Path) -> bool:
    """Install ``wheels`` into ``site``, and whether that worked."""
    flags = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--no-input", "--upgrade"]
    flags += ["--disable-pip-version-check", "--quiet", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *flags, *map(str, wheels)]
    return subprocess.run(command, check=False).returncode == 0


def unpack(folder: Path, site: Path) -> None:
    """All of them at once; if one does not fit this Python, one by one."""
    wheels = [
        wheel
        for wheel in sorted(folder.glob("*.whl"))
        if (name := wheel.name.split("-")[0]) not in ONLY_IF_MISSING
        or importlib.util.find_spec(name) is None
    ]
    if not wheels:
        say(f"no wheels in {folder}: only optimizers that are installed")
        return
    missing = [] if pip(wheels, site) else [w for w in wheels if not pip([w], site)]
    for wheel in wheels:
        say(f"{wheel.name}: {'NOT installed' if wheel in missing else 'installed'}")


def compile_kernels() -> None:
    """adafactor8bit compiles its kernels at its first step, which takes a minute or two."""
    if importlib.util.find_spec("adafactor8bit") is None:
        return
    begin = time.monotonic()
    try:
        module = importlib.import_module("adafactor8bit.optimizer")
        done = module._load_cuda_module()
    except Exception as error:
        say(f"adafactor8bit's kernels: {type(error).__name__}: {error}")
        return
    what = "compiled" if done else "NOT compiled, see peers.log"
    say(f"adafactor8bit's kernels: {what} after {time.monotonic() - begin:.0f} s")


def main() -> None:
    """Unpack, say so, compile."""
    folder, site = Path(sys.argv[1]), Path(sys.argv[2])
    site.mkdir(parents=True, exist_ok=True)
    unpack(folder, site)
    print("unpacked", flush=True)
    importlib.invalidate_caches()
    compile_kernels()
    print("all done", flush=True)


if __name__ == "__main__":
    main()
