"""What finding and opening a compiled library has in common, whichever library it is.

The libraries are plain shared objects on PyTorch's stable ABI. Opening one registers its
implementations of the ``came8bit`` operators; nothing can unregister them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Options that no kernel has yet: with them the reference runs, whatever library is loaded.
REFERENCE_ONLY = ("nesterov=True",)

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


class NotLoadedError(Exception):
    """A library cannot be used; carries the reason and what to do about it."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cure = cure


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
    for folder in package_folders():
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                return str(path)
    return None


def absent() -> NotLoadedError:
    """Explain why a library that every build with kernels has is not in the package."""
    note = build_info()
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
        f"it was built without them ({note.get('reason')})", f"change that and {REINSTALL}"
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
