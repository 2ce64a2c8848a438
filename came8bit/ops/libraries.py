"""Find and open the compiled libraries, and say why where one is missing.

They are plain shared objects on PyTorch's stable ABI. Opening one registers its kernels for the
``came8bit`` operators, so ``schema`` defines those first and then calls :func:`load`. Without a
library the operators run the reference implementation: the same numbers, many times slower, which
is worth one warning. For the CPU it comes at once; CUDA tensors may never turn up, so for CUDA it
waits for the first one (:func:`warn_once`).

Environment variables, read when the package is imported:

* ``CAME8BIT_CPU_ISA=baseline|avx2|avx512``: use these instructions, not the best ones the CPU has.
* ``CAME8BIT_DISABLE_KERNELS=1`` or ``CAME8BIT_PURE=1``: run the reference, without the warning.
* ``CAME8BIT_REQUIRE_KERNELS=1``: without the CPU kernels, fail to import; ``cuda``: without those
  for CUDA, too.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

#: Names of the instruction sets, in the order of their numbers in ``csrc/cpu/dispatch.cpp``.
CPU_ISAS = ("baseline", "avx2", "avx512")

#: Options that a device's kernels do not have yet, with the value: the reference runs instead.
REFERENCE_ONLY: dict[str, tuple[tuple[str, object], ...]] = {"cpu": (), "cuda": ()}

#: The stable ABI that the libraries are built for.
OLDEST_TORCH = (2, 10)

REINSTALL = "reinstall came8bit with pip install --force-reinstall --no-deps --no-cache-dir"


@dataclass(frozen=True)
class KernelStatus:
    """What is known about one compiled library.

    Attributes:
        loaded: Whether its operators are in use.
        path: The file that was opened, or None.
        isa: What it runs on, or None if it is not loaded. On the CPU the instruction set in use,
            ``"avx2"``; for CUDA the architectures it has code for, ``"sm_90 compute_90"``.
        reason: Why it is not loaded; empty when it is.
        cure: What would change that, as an imperative; empty when it is loaded.
    """

    loaded: bool
    path: str | None = None
    isa: str | None = None
    reason: str = ""
    cure: str = ""


@dataclass(frozen=True)
class KernelsStatus:
    """What is known about all compiled libraries, and the options that none of them has."""

    cpu: KernelStatus
    cuda: KernelStatus
    reference_only: tuple[str, ...]


class NotLoadedError(Exception):
    """A library cannot be used; carries the reason and what to do about it."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure


class Library:
    """The compiled library of one device, opened at most once.

    Args:
        device: ``"CPU"`` or ``"CUDA"``.
        functions: C functions that it must have, by name, with the type they return.
        isa: what it runs on, asked of the opened library.
    """

    def __init__(
        self, device: str, functions: dict[str, Any], isa: Callable[[ctypes.CDLL], str]
    ) -> None:
        self.device = device
        self.handle: ctypes.CDLL | None = None
        self._functions = functions
        self._isa = isa
        self._status = KernelStatus(False, reason="they have not been looked for yet")
        self._tried = False

    def load(self, required_by: str) -> bool:
        """Open the library, and return False if that had been tried before.

        Raises:
            ImportError: it is not available, and ``required_by`` names the setting that asks for
                it.
        """
        if self._tried:
            return False
        try:
            path = self._find()
            self.handle = self._open(path)
            self._status = KernelStatus(True, path)
        except NotLoadedError as missing:
            if required_by:
                raise ImportError(
                    f"{required_by} is set, but came8bit's compiled {self.device} kernels are not "
                    f"available: {missing.reason}. To get them, {missing.cure}."
                ) from missing.__cause__
            self._status = KernelStatus(False, reason=missing.reason, cure=missing.cure)
        self._tried = True
        return True

    def status(self) -> KernelStatus:
        """Return whether the library is loaded and, if not, why."""
        return replace(self._status, isa=self._isa(self.handle)) if self.handle else self._status

    def _find(self) -> str:
        """Return the path of the library; raise NotLoadedError if there is none to use."""
        cuda = torch.version.cuda
        if self.device == "CUDA" and cuda is None:
            # Never open it here: it needs libtorch_cuda, which only a CUDA build has.
            built = "for ROCm" if getattr(torch.version, "hip", None) else "without CUDA"
            raise NotLoadedError(
                f"this torch is built {built}", "install a CUDA build of torch and " + REINSTALL
            )
        check_wanted()
        stem = f"_C_{self.device.lower()}"
        path = find((f"{stem}.so", f"{stem}.dll"))  # CMake's modules end in .so on macOS, too
        if path is not None:
            return path
        note = build_info()
        if self.device == "CUDA" and note.get("kernels") and not note["cuda"]["built"]:
            needs = how_to_get_nvcc(str(cuda)) if note["cuda"].get("needs_nvcc") else "fix this"
            raise NotLoadedError(
                f"it was built without them ({note['cuda']['reason']})", f"{needs} and {REINSTALL}"
            )
        raise absent(note)

    def _open(self, path: str) -> ctypes.CDLL:
        try:
            torch.ops.load_library(path)
            library = ctypes.CDLL(path)  # the same library again: torch keeps its handle to itself
            for name, result in self._functions.items():
                getattr(library, name).restype = result
        except (OSError, RuntimeError, AttributeError) as error:
            raise NotLoadedError(
                f"{path} cannot be used with torch {torch.__version__} "
                f"({error.__cause__ or error})",
                REINSTALL,
            ) from error
        return library


CPU = Library(
    "CPU",
    {f"came8bit_cpu_{name}": ctypes.c_int for name in ("best_isa", "isa", "set_isa")},
    lambda library: CPU_ISAS[library.came8bit_cpu_isa()],
)
CUDA = Library(
    "CUDA",
    {"came8bit_cuda_architectures": ctypes.c_char_p},
    lambda library: str(library.came8bit_cuda_architectures().decode()),
)
_warned: set[str] = set()  # of what takes the reference


def load() -> KernelsStatus:
    """Open the compiled libraries once; later calls only report.

    Returns:
        What :func:`status` returns.

    Raises:
        ImportError: the kernels are not available and ``CAME8BIT_REQUIRE_KERNELS`` is set.
        ValueError: ``CAME8BIT_CPU_ISA`` names no known instruction set.
        RuntimeError: ``CAME8BIT_CPU_ISA`` names one that this CPU or this build lacks.
    """
    required, isa = "CAME8BIT_REQUIRE_KERNELS", os.environ.get("CAME8BIT_CPU_ISA")
    if isa:
        _isa_number(isa, source="CAME8BIT_CPU_ISA")
    if CPU.load(required if flag(required) else ""):
        if CPU.handle is None and not reference_wanted():
            warnings.warn(
                "came8bit runs without its compiled CPU kernels, many times slower: "
                f"{CPU.status().reason}. To get them, {CPU.status().cure}. "
                "To silence this warning, set CAME8BIT_DISABLE_KERNELS=1.",
                RuntimeWarning,
                stacklevel=2,
            )
        if CPU.handle is not None and isa:
            _set_isa(CPU.handle, isa, source="CAME8BIT_CPU_ISA")
    of_cuda = os.environ.get(required, "").strip().lower() == "cuda"
    CUDA.load(f"{required}=cuda" if of_cuda else "")
    return status()


def status() -> KernelsStatus:
    """Return which compiled libraries are loaded and, if not, why."""
    options = tuple(
        f"{name}={value!r} on {device.upper()}"
        for device, missing in REFERENCE_ONLY.items()
        for name, value in missing
    )
    return KernelsStatus(cpu=CPU.status(), cuda=CUDA.status(), reference_only=options)


def warn_once() -> None:
    """Warn that a CUDA tensor takes the reference, unless that was asked for or said before."""
    if "CUDA" in _warned or reference_wanted():
        return
    _warned.add("CUDA")
    warnings.warn(
        "came8bit has no CUDA kernels here, so CUDA tensors fall back to the reference "
        f"implementation, many times slower: {CUDA.status().reason}. To get them, "
        f"{CUDA.status().cure}.",
        RuntimeWarning,
        stacklevel=2,
    )


def needs_reference(options: Mapping[str, Any], device: str) -> bool:
    """Return whether the kernels of ``device`` lack one of ``options``, and warn of each once."""
    missing = [
        f"{device.upper()} kernels do not have {name}={value!r} yet"
        for name, value in REFERENCE_ONLY.get(device, ())
        if options[name] == value
    ]
    for option in missing:
        if option not in _warned:
            _warned.add(option)
            warnings.warn(
                f"came8bit's compiled {option}: the reference implementation runs instead, with "
                "the same rule and many times slower",
                RuntimeWarning,
                stacklevel=2,
            )
    return bool(missing)


# --- instruction sets -----------------------------------------------------------------------------


def supported_cpu_isas() -> list[str]:
    """Return the instruction sets that this CPU and this build have, or [] without the kernels."""
    return list(CPU_ISAS[: CPU.handle.came8bit_cpu_best_isa() + 1]) if CPU.handle else []


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels use now.

    Raises:
        RuntimeError: the kernels are not loaded.
    """
    return CPU_ISAS[_loaded_cpu().came8bit_cpu_isa()]


def set_cpu_isa(name: str) -> None:
    """Have the CPU kernels use the instruction set ``name`` from now on, in every thread.

    The results do not depend on it; this is for tests and benchmarks.

    Raises:
        ValueError: ``name`` is not in :data:`CPU_ISAS`.
        RuntimeError: this CPU or this build lacks it, or the kernels are not loaded.
    """
    _set_isa(_loaded_cpu(), name, source="set_cpu_isa")


def _loaded_cpu() -> ctypes.CDLL:
    if CPU.handle is None:
        raise RuntimeError(
            f"the compiled CPU kernels of came8bit are not loaded: {CPU.status().reason}"
        )
    return CPU.handle


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


# --- where libraries are, and why not -------------------------------------------------------------


def flag(name: str) -> bool:
    """Return whether the environment variable ``name`` is set to something that means yes."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def reference_wanted() -> bool:
    """Return whether the environment asks for the reference implementation."""
    return flag("CAME8BIT_DISABLE_KERNELS") or flag("CAME8BIT_PURE")


def check_wanted() -> None:
    """Raise NotLoadedError if the environment or the version of torch rules out any library."""
    if reference_wanted():
        name = "CAME8BIT_PURE" if flag("CAME8BIT_PURE") else "CAME8BIT_DISABLE_KERNELS"
        raise NotLoadedError(f"{name} is set", f"unset {name}")
    version = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise NotLoadedError(
            f"they need torch >= 2.10, this is torch {torch.__version__}",
            "upgrade torch and " + REINSTALL,
        )


def package_folders() -> list[str]:
    """Return the folders of the package, which need not be the one of this file.

    An editable installation keeps the Python files and the libraries in different places.
    """
    spec = importlib.util.find_spec(__package__.partition(".")[0])
    return list(spec.submodule_search_locations or []) if spec is not None else []


def find(names: Sequence[str]) -> str | None:
    """Return the path of the first file in the package with one of ``names``, or None."""
    paths = (Path(folder, name) for folder in package_folders() for name in names)
    return next((str(path) for path in paths if path.is_file()), None)


def absent(note: dict[str, Any]) -> NotLoadedError:
    """Explain, by what :func:`build_info` returned, why a library is not in the package."""
    folders = ", ".join(package_folders())
    if not note:
        return NotLoadedError(
            f"came8bit is imported from {folders} and is not installed",
            "run pip install . there, or pip install -e . to keep working on these files",
        )
    if note.get("kernels"):
        return NotLoadedError(
            f"the installed came8bit has them, but this one is imported from {folders}",
            "start Python in another folder, or run pip install -e . in this one",
        )
    return NotLoadedError(
        f"it was built without them ({note.get('reason')})", f"fix this and {REINSTALL}"
    )


def how_to_get_nvcc(cuda: str) -> str:
    """Return where to get a compiler for a torch that is built for CUDA ``cuda`` ("13.0").

    NVIDIA publishes nvcc on PyPI from CUDA 13 on. The extras pin the parts of the compiler to one
    release: nvcc's own requirements do not.
    """
    if int(cuda.split(".")[0]) >= 13:
        return f'install nvcc with pip install "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={cuda}.*"'
    return (
        f"install CUDA {cuda}'s nvcc (NVIDIA's toolkit, or conda install -c nvidia "
        f"cuda-nvcc={cuda} cuda-cudart-dev={cuda}; PyPI has it from CUDA 13 on)"
    )


def build_info() -> dict[str, Any]:
    """Return what the build wrote down about itself.

    Returns:
        ``kernels`` (whether they were built), ``reason`` (why not), ``torch`` (the version they
        were compiled against) and ``cuda``, a dictionary with ``built``, ``reason``, ``nvcc`` and
        ``architectures``; empty if came8bit is not installed, only imported.
    """
    try:
        distribution = importlib.metadata.distribution("came8bit")
    except importlib.metadata.PackageNotFoundError:
        return {}
    text = distribution.read_text("came8bit-build.json")
    if not text:
        return {}
    note: dict[str, Any] = json.loads(text)
    cuda = distribution.read_text("came8bit-cuda.json")
    note["cuda"] = json.loads(cuda) if cuda else {"built": False, "reason": note.get("reason", "")}
    return note
