"""Download what the GPU report needs besides torch, for a machine without a network.

    python tools/fetch_gpu_wheels.py --out wheels --python 3.12

The other optimizers and the tests' plugins, without dependencies, for Linux on x86-64. Sizes are
printed, since whatever carries the folder there may have a limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

WHEELS = (
    "bitsandbytes",
    "came-pytorch==0.1.3",
    "adafactor8bit==0.4.6",
    "torchao",
    # For the tests.
    "execnet",
    "expecttest",
    "hypothesis",
    "pytest-reportlog",
    "pytest-timeout",
    "pytest-xdist",
    "sortedcontainers",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)] + ["manylinux2014_x86_64"]


def main() -> int:
    """Download one by one; say what could not be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    options = parser.parse_args()
    flags = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--quiet"]
    flags += ["--python-version", options.python, "--disable-pip-version-check"]
    flags += [part for platform in PLATFORMS for part in ("--platform", platform)]
    missing = 0
    for name in WHEELS:
        command = [sys.executable, "-m", "pip", "download", *flags, "--dest", options.out, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            missing += 1
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{name} could not be downloaded: {reason}", file=sys.stderr)
    total = 0
    for wheel in sorted(options.out.glob("*.whl")):
        total += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 2**20:7.1f} MiB  {wheel.name}")
    print(f"{total / 2**20:7.1f} MiB  in {options.out}")
    return 1 if missing == len(WHEELS) else 0


if __name__ == "__main__":
    sys.exit(main())
