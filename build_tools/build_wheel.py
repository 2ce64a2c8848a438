"""Build the wheel for a release: both libraries, code for every GPU, and check what came out.

    python build_tools/build_wheel.py                    into dist/
    CUDACXX=/path/to/nvcc python build_tools/build_wheel.py

Any build of torch will do to compile against, a CPU one too (docs/internals/releasing.md
says which nvcc, and why). The wheel is tagged with the oldest manylinux that has what its libraries
need; auditwheel is not used, because it would copy torch into the wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from check_symbols import library_problems

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("came8bit/_C_cpu.so", "came8bit/_C_cuda.so")
LIMIT = 100 << 20
"""Bytes; PyPI takes no larger file."""

# Of PEP 600 and the images that go by these names: glibc, libstdc++.
POLICIES = {
    "manylinux_2_17": ("2.17", "3.4.19"),
    "manylinux_2_28": ("2.28", "3.4.24"),
    "manylinux_2_31": ("2.31", "3.4.28"),
    "manylinux_2_34": ("2.34", "3.4.29"),
    "manylinux_2_35": ("2.35", "3.4.30"),
    "manylinux_2_39": ("2.39", "3.4.33"),
}


def run(*command: str | Path, **variables: str) -> str:
    """Return what ``command`` prints; its failure is ours."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def version(text: str) -> tuple[int, ...]:
    """``"2.28"`` as numbers that compare."""
    return tuple(map(int, text.split(".")))


def newest_needed(libraries: list[Path], prefix: str) -> str:
    """Return the newest version of the symbols with ``prefix`` that the libraries use."""
    found = {"0"}
    for library in libraries:
        found |= set(re.findall(rf"\b{prefix}_([\d.]+)", run("readelf", "-V", "-W", library)))
    return max(found, key=version)


def policy(libraries: list[Path]) -> str | None:
    """Return the oldest manylinux that has everything, or None."""
    glibc, libstdcxx = (newest_needed(libraries, name) for name in ("GLIBC", "GLIBCXX"))
    print(f"the libraries need glibc {glibc}, libstdc++ {libstdcxx}")
    for name, (has_glibc, has_libstdcxx) in POLICIES.items():
        if version(glibc) <= version(has_glibc) and version(libstdcxx) <= version(has_libstdcxx):
            return name
    return None


def check(wheel: Path, folder: Path) -> list[Path]:
    """Unpack the wheel, hold it against what a release has to have, return its libraries."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    problems = [f"{name} is not in it" for name in LIBRARIES if name not in names]
    notes = [name for name in names if name.endswith(("came8bit-build.json", "came8bit-cuda.json"))]
    note = {name.rsplit("/", 1)[1]: json.loads((folder / name).read_text()) for name in notes}
    if not note["came8bit-cuda.json"]["built"]:
        problems.append(f"no CUDA library: {note['came8bit-cuda.json']['reason']}")
    if wheel.stat().st_size > LIMIT:
        problems.append(f"{wheel.stat().st_size >> 20} MiB, more than {LIMIT >> 20}")
    libraries = [folder / name for name in LIBRARIES if name in names]
    for library in libraries:
        problems += [f"{library.name}: {problem}" for problem in library_problems(library)]
    if problems:
        raise SystemExit("\n".join([f"{wheel.name} cannot be released:", *problems]))
    print(
        f"nvcc {note['came8bit-cuda.json']['nvcc']}, {note['came8bit-cuda.json']['architectures']}"
    )
    return libraries


def main() -> int:
    """Build, check, tag."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary, "wheel")
        flags = ["--no-deps", "--disable-pip-version-check", "--quiet", "--wheel-dir", built]
        variables = {"CAME8BIT_CUDA": "release", "CAME8BIT_REQUIRE_KERNELS": "1"}
        run(sys.executable, "-m", "pip", "wheel", *flags, ROOT, **variables)
        (wheel,) = built.glob("*.whl")
        libraries = check(wheel, Path(temporary, "unpacked"))
        tag = policy(libraries)
        if tag is None:
            print("no manylinux has all of that: use an older image (docs/internals/releasing.md)")
        else:
            platform = f"{tag}_x86_64"
            flags = ["--platform-tag", platform, "--remove"]
            run(sys.executable, "-m", "wheel", "tags", *flags, wheel)
            (wheel,) = built.glob("*.whl")
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / wheel.name
        target.write_bytes(wheel.read_bytes())
    print(f"{target}, {target.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
