"""Finds and opens the compiled kernels, and says why they are not there when they are not.

Opening a library registers its implementations of the ``came8bit`` operators, so ``schema`` defines
their schemas first and then calls :func:`load`. Without the library the operators run the reference
implementation: the same numbers, many times slower, which is worth one warning. This module is
about the CPU library; ``cuda_library`` about the other one.

Environment variables, read when the package is imported:

* ``CAME8BIT_CPU_ISA=baseline|avx2|avx512``: use these instructions, not the best ones the CPU has.
* ``CAME8BIT_DISABLE_KERNELS=1`` or ``CAME8BIT_PURE=1``: run the reference, without the warning.
* ``CAME8BIT_REQUIRE_KERNELS=1``: without the CPU kernels, fail to import; ``cuda``: without those
  for CUDA, too.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass

import torch

from . import cuda_library, libraries
from .libraries import REINSTALL, KernelStatus, NotLoadedError, flag

#: Names of the instruction sets, in the order of their numbers in ``csrc/cpu/dispatch.cpp``.
CPU_ISAS = ("baseline", "avx2", "avx512")

_CPU_FILES = ("_C_cpu.so", "_C_cpu.dll")  # CMake's MODULE libraries end in .so on macOS, too


@dataclass(frozen=True)
class KernelsStatus:
    """What is known about all compiled libraries, and the options that none of them has."""

    cpu: KernelStatus
    cuda: KernelStatus
    reference_only: tuple[str, ...] = libraries.REFERENCE_ONLY


_library: ctypes.CDLL | None = None
_path: str | None = None
_missing: KernelStatus | None = None  # why there is no library, once load() has run


def load() -> KernelsStatus:
    """Open the compiled kernels once; later calls only report.

    Returns:
        What :func:`status` returns.

    Raises:
        ImportError: If the kernels are not available and ``CAME8BIT_REQUIRE_KERNELS`` is set.
        ValueError: If ``CAME8BIT_CPU_ISA`` names no known instruction set.
        RuntimeError: If ``CAME8BIT_CPU_ISA`` names one that this CPU or this build lacks.
    """
    global _library, _path, _missing
    if _library is not None or _missing is not None:
        return status()
    wanted_isa = os.environ.get("CAME8BIT_CPU_ISA")
    if wanted_isa:
        _isa_number(wanted_isa, source="CAME8BIT_CPU_ISA")
    try:
        path = _find_cpu_library()
        library = _open(path)
    except NotLoadedError as missing:
        if flag("CAME8BIT_REQUIRE_KERNELS"):
            raise ImportError(
                "CAME8BIT_REQUIRE_KERNELS is set, but came8bit's compiled CPU kernels are not "
                f"available: {missing.reason}. To get them, {missing.cure}."
            ) from missing.__cause__
        _missing = KernelStatus(loaded=False, reason=missing.reason, cure=missing.cure)
        if not libraries.reference_wanted():
            warnings.warn(
                "came8bit runs without its compiled CPU kernels, many times slower: "
                f"{missing.reason}. To get them, {missing.cure}. "
                "To silence this warning, set CAME8BIT_DISABLE_KERNELS=1.",
                RuntimeWarning,
                stacklevel=2,
            )
    else:
        if wanted_isa:
            _set_isa(library, wanted_isa, source="CAME8BIT_CPU_ISA")
        _library, _path = library, path
    cuda_library.load()
    return status()


def status() -> KernelsStatus:
    """Say which compiled libraries are loaded and, if not, why."""
    if _library is not None:
        cpu = KernelStatus(loaded=True, path=_path, isa=cpu_isa())
    else:
        cpu = _missing or KernelStatus(loaded=False, reason="they have not been looked for yet")
    return KernelsStatus(cpu=cpu, cuda=cuda_library.status())


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
    """Return the path of the CPU library; raise NotLoadedError if there is none to use."""
    libraries.check_wanted()
    path = libraries.find(_CPU_FILES)
    if path is None:
        raise libraries.absent()
    return path


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
        raise NotLoadedError(
            f"{path} cannot be used with torch {torch.__version__} ({error.__cause__ or error})",
            REINSTALL,
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
