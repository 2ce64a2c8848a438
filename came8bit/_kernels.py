"""Finds and opens the compiled kernels, and says why they are not there when they are not.

The library is a plain shared object on PyTorch's stable ABI. Opening it registers the CPU
implementations of the ``came8bit`` operators, so ``_ops`` defines their schemas first and then
calls :func:`load`. Without the library the operators run the reference implementation: the same
numbers, many times slower, which is worth one warning.

Environment variables, read when the package is imported:

* ``CAME8BIT_CPU_ISA=baseline|avx2|avx512``: use these instructions, not the best ones the CPU has.
* ``CAME8BIT_DISABLE_KERNELS=1`` or ``CAME8BIT_PURE=1``: run the reference, without the warning.
* ``CAME8BIT_REQUIRE_KERNELS=1``: without the kernels, fail to import.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

#: Names of the instruction sets, in the order of their numbers in ``csrc/cpu/dispatch.cpp``.
CPU_ISAS = ("baseline", "avx2", "avx512")

_OLDEST_TORCH = (2, 10)
_CPU_FILES = ("_C_cpu.so", "_C_cpu.dll")  # CMake's MODULE libraries end in .so on macOS, too
_REINSTALL = "reinstall came8bit with pip install --force-reinstall --no-deps --no-cache-dir"


@dataclass(frozen=True)
class KernelStatus:
    """What is known about one compiled library.

    Attributes:
        loaded: Whether its operators are in use.
        path: The file that was opened, or None.
        isa: The instruction set in use, one of :data:`CPU_ISAS`, or None.
        reason: Why it is not loaded; empty when it is.
    """

    loaded: bool
    path: str | None
    isa: str | None
    reason: str


@dataclass(frozen=True)
class KernelsStatus:
    """What is known about all compiled libraries."""

    cpu: KernelStatus


class _NotLoadedError(Exception):
    """The kernels cannot be used; carries the reason and what to do about it."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure


_library: ctypes.CDLL | None = None
_path: str | None = None
_reason: str | None = None  # None until load() has run


def load() -> KernelsStatus:
    """Open the compiled kernels once; later calls only report.

    Returns:
        What :func:`status` returns.

    Raises:
        ImportError: If the kernels are not available and ``CAME8BIT_REQUIRE_KERNELS`` is set.
        ValueError: If ``CAME8BIT_CPU_ISA`` names no known instruction set.
        RuntimeError: If ``CAME8BIT_CPU_ISA`` names one that this CPU or this build lacks.
    """
    global _library, _path, _reason
    if _reason is not None:
        return status()
    wanted_isa = os.environ.get("CAME8BIT_CPU_ISA")
    if wanted_isa:
        _isa_number(wanted_isa, source="CAME8BIT_CPU_ISA")
    try:
        path = _find_cpu_library()
        library = _open(path)
    except _NotLoadedError as missing:
        if _flag("CAME8BIT_REQUIRE_KERNELS"):
            raise ImportError(
                "CAME8BIT_REQUIRE_KERNELS is set, but came8bit's compiled CPU kernels are not "
                f"available: {missing.reason}. To get them, {missing.cure}."
            ) from missing.__cause__
        _reason = missing.reason
        if not _reference_wanted():
            warnings.warn(
                "came8bit runs without its compiled CPU kernels, many times slower: "
                f"{missing.reason}. To get them, {missing.cure}. "
                "To silence this warning, set CAME8BIT_DISABLE_KERNELS=1.",
                RuntimeWarning,
                stacklevel=2,
            )
        return status()
    if wanted_isa:
        _set_isa(library, wanted_isa, source="CAME8BIT_CPU_ISA")
    _library, _path, _reason = library, path, ""
    return status()


def status() -> KernelsStatus:
    """Say which compiled libraries are loaded and, if not, why."""
    if _library is None:
        reason = "they have not been looked for yet" if _reason is None else _reason
        return KernelsStatus(KernelStatus(loaded=False, path=None, isa=None, reason=reason))
    return KernelsStatus(KernelStatus(loaded=True, path=_path, isa=cpu_isa(), reason=""))


def build_info() -> dict[str, object]:
    """Return what the build wrote down about itself.

    Returns:
        ``kernels`` (whether they were built), ``reason`` (why not) and ``torch`` (the version they
        were compiled against); empty if came8bit is not installed, only imported.
    """
    try:
        text = importlib.metadata.distribution("came8bit").read_text("came8bit-build.json")
    except importlib.metadata.PackageNotFoundError:
        return {}
    note: dict[str, object] = json.loads(text) if text else {}
    return note


def supported_cpu_isas() -> list[str]:
    """Return the instruction sets that this CPU and this build have, or [] without the kernels."""
    if _library is None:
        return []
    return list(CPU_ISAS[: _library.came8bit_cpu_best_isa() + 1])


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels use now.

    Raises:
        RuntimeError: If the kernels are not loaded.
    """
    return CPU_ISAS[_loaded_library().came8bit_cpu_isa()]


def set_cpu_isa(name: str) -> None:
    """Have the CPU kernels use the instruction set ``name`` from now on, in every thread.

    The results do not depend on it; this is for tests and benchmarks.

    Raises:
        ValueError: If ``name`` is not in :data:`CPU_ISAS`.
        RuntimeError: If this CPU or this build lacks it, or the kernels are not loaded.
    """
    _set_isa(_loaded_library(), name, source="set_cpu_isa")


def _find_cpu_library() -> str:
    """Return the path of the CPU library; raise _NotLoadedError if there is none to use."""
    if _reference_wanted():
        name = "CAME8BIT_PURE" if _flag("CAME8BIT_PURE") else "CAME8BIT_DISABLE_KERNELS"
        raise _NotLoadedError(f"{name} is set", f"unset {name}")
    version = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if version is None or (int(version[1]), int(version[2])) < _OLDEST_TORCH:
        raise _NotLoadedError(
            f"they need torch >= 2.10, this is torch {torch.__version__}",
            "upgrade torch and " + _REINSTALL,
        )
    # The search path of the package, not the folder of this file: an editable installation keeps
    # the Python files and the library in different places.
    spec = importlib.util.find_spec(__package__)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for name in _CPU_FILES:
            path = Path(folder, name)
            if path.is_file():
                return str(path)
    raise _absent(folders)


def _absent(folders: list[str]) -> _NotLoadedError:
    """Explain why no library lies in the package's ``folders``."""
    note = build_info()
    if not note:
        return _NotLoadedError(
            f"came8bit is imported from {', '.join(folders)} and is not installed",
            "run pip install . there, or pip install -e . to keep working on these files",
        )
    if note.get("kernels"):
        return _NotLoadedError(
            f"the installed came8bit has them, but this one is imported from {', '.join(folders)}",
            "start Python in another folder, or run pip install -e . in this one",
        )
    return _NotLoadedError(
        f"it was built without them ({note.get('reason')})",
        f"change that and {_REINSTALL}",
    )


def _open(path: str) -> ctypes.CDLL:
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)  # the same library again: torch keeps its handle to itself
        for name, arguments in (
            ("came8bit_cpu_best_isa", []),
            ("came8bit_cpu_isa", []),
            ("came8bit_cpu_set_isa", [ctypes.c_int]),
        ):
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
    except (OSError, RuntimeError, AttributeError) as error:
        raise _NotLoadedError(
            f"{path} cannot be used with torch {torch.__version__} ({error})", _REINSTALL
        ) from error
    return library


def _loaded_library() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(
            f"the compiled CPU kernels of came8bit are not loaded: {status().cpu.reason}"
        )
    return _library


def _isa_number(name: str, source: str) -> int:
    if name not in CPU_ISAS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(CPU_ISAS)}")
    return CPU_ISAS.index(name)


def _set_isa(library: ctypes.CDLL, name: str, source: str) -> None:
    if library.came8bit_cpu_set_isa(_isa_number(name, source)) != 0:
        available = CPU_ISAS[: library.came8bit_cpu_best_isa() + 1]
        raise RuntimeError(
            f"{source}: {name!r} is not supported by this CPU or this build of came8bit; "
            f"available: {', '.join(available)}"
        )


def _reference_wanted() -> bool:
    return _flag("CAME8BIT_DISABLE_KERNELS") or _flag("CAME8BIT_PURE")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")
