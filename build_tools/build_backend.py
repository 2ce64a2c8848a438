"""The build backend: scikit-build-core, plus what to do where the kernels cannot be built.

The kernels use PyTorch's stable ABI, so any torch >= 2.10 will do to compile them; the library
then works with every later one. In order of preference that torch is

1. the folder named in ``CAME8BIT_TORCH_DIR``;
2. the one in the interpreter that is being installed into. pip's build isolation hides it,
   ``python -I`` sees it all the same;
3. one that an isolated build installed because ``get_requires_for_build_wheel`` asked for it;
4. the one of an environment in reach (a ``python`` on PATH, ``.venv`` in the working directory):
   tools that build in an environment of their own (uv, build) leave no better trace of the target.

Where 1, 2 and 4 find none, torch is requested as a build requirement; where that is switched off
as well (``--no-build-isolation``), the build fails and says what to do.

What cannot be compiled (no compiler, no CMake, torch older than 2.10, a compiler error) ends in a
pure Python wheel that says why: at build, at import and in ``came8bit info``.
``CAME8BIT_REQUIRE_KERNELS=1`` makes it an error instead, ``CAME8BIT_PURE=1`` asks for the pure
wheel. The outcome is kept in the wheel's metadata as ``came8bit-build.json``, which
``came8bit/ops/libraries.py`` reads.

Whether the CUDA library is built, too, is decided in ``csrc/cmake/cuda.cmake``, which leaves a note
of its own there (``came8bit-cuda.json``). If it was to be built only because it looked possible,
and the build fails, there is a second one without it. ``CAME8BIT_CUDA=ON`` makes that an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from scikit_build_core import build as _skbuild
from scikit_build_core.errors import ScikitBuildError

ConfigSettings = dict[str, Any] | None
OLDEST_TORCH = (2, 10)
_ROOT = Path(__file__).resolve().parent.parent
_CUDA_CHOSEN = "came8bit: CUDA kernels by nvcc"  # said by csrc/cmake/cuda.cmake
_FINDER = _ROOT / "csrc" / "cmake" / "find_torch.py"

_CURES = """
  * install torch >= 2.10 first and run  pip install --no-build-isolation .
  * or name the folder of an installed torch:  CAME8BIT_TORCH_DIR=/path/to/site-packages/torch
  * or do without the compiled kernels (slow):  CAME8BIT_PURE=1"""


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Return the build requirements of a wheel (PEP 517)."""
    return _requirements(_skbuild.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Return the build requirements of an editable installation (PEP 660)."""
    return _requirements(_skbuild.get_requires_for_build_editable, config_settings)


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    """Return the build requirements of a source distribution (PEP 517)."""
    return _skbuild.get_requires_for_build_sdist(config_settings)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    """Build a source distribution (PEP 517)."""
    return _skbuild.build_sdist(sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel, with the kernels where they can be built (PEP 517)."""
    return _build(_skbuild.build_wheel, wheel_directory, config_settings)


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build an editable wheel, with the kernels where they can be built (PEP 660)."""
    return _build(_skbuild.build_editable, wheel_directory, config_settings)


# prepare_metadata_for_build_* are left out on purpose: whether the wheel is pure is known only
# after the build, and the metadata says so.


def _requirements(hook: Callable[..., list[str]], config_settings: ConfigSettings) -> list[str]:
    if _flag("CAME8BIT_PURE"):
        return hook(_pure_settings(config_settings))
    found = hook(config_settings)
    if _find_torch() is None:
        _say("no torch in reach of this isolated build: asking for one to compile against")
        found.append(f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    return found


def _build(hook: Callable[..., str], wheel_directory: str, config_settings: ConfigSettings) -> str:
    cuda = _cuda_mode(config_settings)
    if _flag("CAME8BIT_PURE"):
        if _flag("CAME8BIT_REQUIRE_KERNELS"):
            _fail("CAME8BIT_PURE=1 and CAME8BIT_REQUIRE_KERNELS=1 contradict each other: unset one")
        if cuda not in ("AUTO", "OFF"):
            _fail(f"CAME8BIT_PURE=1 and CAME8BIT_CUDA={cuda} contradict each other: unset one")
        return _pure(hook, wheel_directory, config_settings, "CAME8BIT_PURE=1 was set")
    torch_dir = _find_torch()
    if torch_dir is None:
        _fail("no torch was found to compile the kernels against. Do one of these:" + _CURES)
    version = _torch_version(torch_dir)
    if version < OLDEST_TORCH:
        found = ".".join(map(str, version))
        reason = f"they need torch >= 2.10, found torch {found} in {torch_dir}"
    else:
        settings = {**(config_settings or {}), "cmake.define.CAME8BIT_TORCH_DIR": torch_dir}
        note = {"kernels": True, "reason": "", "torch": ".".join(map(str, version))}
        with _build_note(note):
            wheel, reason = _attempt(hook, wheel_directory, settings)
        if wheel is not None:
            return wheel
    if cuda not in ("AUTO", "OFF"):
        _fail(f"CAME8BIT_CUDA={cuda}, and the kernels were not built: {reason}")
    if _flag("CAME8BIT_REQUIRE_KERNELS"):
        _fail(f"CAME8BIT_REQUIRE_KERNELS=1, and the kernels were not built: {reason}")
    return _pure(hook, wheel_directory, config_settings, reason)


def _attempt(
    hook: Callable[..., str], wheel_directory: str, settings: dict[str, Any]
) -> tuple[str | None, str]:
    """Build once, and a second time without CUDA if that may help.

    Returns:
        The wheel's name, or None and why it could not be built.
    """
    with _copied_output() as output:
        try:
            return hook(wheel_directory, settings), ""
        except (ScikitBuildError, SystemExit) as error:
            failure = error
    text = output.decode(errors="replace")
    reason = _first_error(text) or str(failure) or repr(failure)
    if _cuda_mode(settings) != "AUTO" or _CUDA_CHOSEN not in text:
        return None, reason
    _say(f"building again WITHOUT CUDA kernels, because: {reason}")
    off = {**settings, "cmake.define.CAME8BIT_CUDA": "OFF"}
    with _variable("CAME8BIT_CUDA_REASON", f"their build failed: {reason}"):
        return _attempt(hook, wheel_directory, off)


def _cuda_mode(settings: ConfigSettings) -> str:
    """Return what ``csrc/cmake/cuda.cmake`` will find in ``CAME8BIT_CUDA``."""
    given = (settings or {}).get("cmake.define.CAME8BIT_CUDA")
    return str(given or os.environ.get("CAME8BIT_CUDA") or "AUTO")


def _pure(
    hook: Callable[..., str], wheel_directory: str, config_settings: ConfigSettings, reason: str
) -> str:
    _say(f"building WITHOUT the compiled kernels: {reason}")
    with _build_note({"kernels": False, "reason": reason, "torch": None}):
        return hook(wheel_directory, _pure_settings(config_settings))


def _pure_settings(config_settings: ConfigSettings) -> dict[str, Any]:
    return {**(config_settings or {}), "wheel.cmake": "false"}


@contextlib.contextmanager
def _build_note(note: dict[str, Any]) -> Iterator[None]:
    """Have scikit-build-core put ``note`` into the wheel's metadata folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "came8bit-build.json")
        path.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        include = f"{path}=${{SKBUILD_METADATA_DIR}}/{path.name}"
        with _variable("SKBUILD_WHEEL_FORCE_INCLUDE", include):
            yield


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _copied_output() -> Iterator[bytearray]:
    """Collect what this process and its children print, while still printing it.

    pip shows a build's output only if the build fails, so the reason for building a pure wheel has
    to be picked out here.
    """
    collected = bytearray()
    saved = [os.dup(1), os.dup(2)]
    read_end, write_end = os.pipe()

    def pump() -> None:
        while chunk := os.read(read_end, 65536):
            collected.extend(chunk)
            os.write(saved[0], chunk)

    thread = threading.Thread(target=pump, daemon=True)
    _flush()
    for stream in (1, 2):
        os.dup2(write_end, stream)
    os.close(write_end)
    thread.start()
    try:
        yield collected
    finally:
        _flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
        thread.join(timeout=60)  # ends when the last child has closed its end of the pipe
        for descriptor in (*saved, read_end):
            os.close(descriptor)


def _first_error(output: str) -> str:
    """Return the first error of CMake or the compiler in ``output`` as one line, or ''."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    cmake = re.search(r"^CMake Error.*\n((?:[ \t]+\S.*\n|\n(?=[ \t]))*)", plain, re.MULTILINE)
    if cmake and cmake.group(1).strip():
        return " ".join(cmake.group(1).split())[:400]
    if cmake:
        return cmake.group(0).strip()[:400]
    compiler = re.search(r"^.*\b(?:error|nvcc fatal)(?: C\d+)?\s*:.*$", plain, re.MULTILINE)
    return compiler.group(0).strip()[:400] if compiler else ""


def _find_torch() -> str | None:
    """Return the folder of a torch to compile against, in the order the module docstring gives."""
    named = os.environ.get("CAME8BIT_TORCH_DIR")
    if named:
        if _torch_version(named) == (0, 0):
            _fail(
                f"CAME8BIT_TORCH_DIR={named} is not the folder of an installed torch package: "
                "expected one with version.py, include/ and lib/ in it"
            )
        return named
    own = _ask(sys.executable)
    if own:
        return own
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).resolve().parent)
    for candidate in _other_interpreters():
        folder = _ask(candidate)
        # Only a guess at the target: an old torch there proves nothing about it.
        if folder and _torch_version(folder) >= OLDEST_TORCH:
            _say(f"compiling against the torch of {candidate}")
            return folder
    return None


def _ask(interpreter: str) -> str | None:
    try:
        answer = subprocess.run(
            [interpreter, "-I", str(_FINDER)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _other_interpreters() -> Iterator[str]:
    own = os.path.realpath(sys.prefix)
    folders = [
        folder
        for folder in os.environ.get("PATH", "").split(os.pathsep)
        if folder and not os.path.realpath(folder).startswith(own + os.sep)
    ]
    working = Path(os.environ.get("PWD") or Path.cwd())
    for start in dict.fromkeys((working, Path.cwd())):
        for parent in (start, *start.parents):
            for inner in ("bin", "Scripts"):
                folders.append(str(parent / ".venv" / inner))
    seen = set()
    for folder in folders:
        for name in ("python3", "python"):
            found = shutil.which(name, path=folder)
            if found and found not in seen:
                seen.add(found)
                yield found
                break


def _torch_version(folder: str) -> tuple[int, int]:
    spec = importlib.util.spec_from_file_location("came8bit_find_torch", _FINDER)
    assert spec is not None
    assert spec.loader is not None
    finder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finder)
    return finder.version(folder) or (0, 0)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _say(text: str) -> None:
    print(f"came8bit: {text}", flush=True)


def _fail(text: str) -> NoReturn:
    raise SystemExit(f"came8bit: {text}")
