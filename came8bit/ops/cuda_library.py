"""Finds and opens the CUDA kernels, and says why they are not there when they are not.

A CUDA build of torch is all that opening them takes; whether there is a GPU shows later. Without
them CUDA tensors take the reference implementation, many times slower. That may never happen, so
the warning waits for the first CUDA tensor: the reference asks for it (:func:`warn_once`).
"""

from __future__ import annotations

import ctypes
import os
import warnings

import torch

from . import libraries
from .libraries import REINSTALL, KernelStatus, NotLoadedError

_FILES = ("_C_cuda.so", "_C_cuda.dll")

_status: KernelStatus | None = None
_warned = False


def load() -> KernelStatus:
    """Open the library once; later calls only report.

    Raises:
        ImportError: If it is not available and ``CAME8BIT_REQUIRE_KERNELS=cuda`` is set.
    """
    global _status
    if _status is not None:
        return _status
    try:
        path = _find()
        _status = KernelStatus(loaded=True, path=path, isa=_open(path))
    except NotLoadedError as missing:
        if os.environ.get("CAME8BIT_REQUIRE_KERNELS", "").strip().lower() == "cuda":
            raise ImportError(
                "CAME8BIT_REQUIRE_KERNELS=cuda is set, but came8bit's CUDA kernels are not "
                f"available: {missing.reason}. To get them, {missing.cure}."
            ) from missing.__cause__
        _status = KernelStatus(loaded=False, reason=missing.reason, cure=missing.cure)
    return _status


def status() -> KernelStatus:
    """Say whether the library is loaded and, if not, why."""
    return _status or KernelStatus(loaded=False, reason="they have not been looked for yet")


def warn_once() -> None:
    """Warn that a CUDA tensor takes the reference, unless that was asked for or said before."""
    global _warned
    if _warned or libraries.reference_wanted():
        return
    _warned = True
    warnings.warn(
        "came8bit has no CUDA kernels here, so CUDA tensors take the reference implementation, "
        f"many times slower: {status().reason}. To get them, {status().cure}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _find() -> str:
    """Return the path of the library; raise NotLoadedError if there is none to use."""
    if torch.version.cuda is None:
        # Never open it here: it needs libtorch_cuda, which only a CUDA build has.
        built = "for ROCm" if getattr(torch.version, "hip", None) else "without CUDA"
        raise NotLoadedError(
            f"this torch is built {built}", "install a CUDA build of torch and " + REINSTALL
        )
    libraries.check_wanted()
    path = libraries.find(_FILES)
    if path is not None:
        return path
    note = libraries.build_info()
    if note and note.get("kernels") and not note["cuda"]["built"]:
        needs = "change that"
        if note["cuda"].get("needs_nvcc"):
            needs = how_to_get_nvcc(torch.version.cuda)
        raise NotLoadedError(
            f"it was built without them ({note['cuda']['reason']})", f"{needs} and {REINSTALL}"
        )
    raise libraries.absent()


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


def _open(path: str) -> str:
    """Open the library and return the architectures it has code for."""
    try:
        torch.ops.load_library(path)
        architectures = ctypes.CDLL(path).came8bit_cuda_architectures
        architectures.restype = ctypes.c_char_p
        return str(architectures().decode())
    except (OSError, RuntimeError, AttributeError) as error:
        raise NotLoadedError(
            f"{path} cannot be used with torch {torch.__version__} ({error.__cause__ or error})",
            REINSTALL,
        ) from error
