"""Opens a build of the kernels and puts them in the place of the package's operators."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from came8bit.ops import schema as _ops
from came8bit.reference import PASSES as PASS_NAMES

from .build import PLAIN
from .control import Control

NAMESPACE = "came8bit_shim"
OPERATORS = ("factored_step_", "unfactored_step_", "quantize_blockwise", "dequantize_blockwise")
PASSES = {kind: [f"{kind}_{name}_" for name in PASS_NAMES] for kind in ("factored", "unfactored")}

_definitions: list[torch.library.Library] = []


def load(path: Path | str) -> Control:
    """Open ``_C_shim``; its operators have the schemas of the package's. Once in a process."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in [*OPERATORS, *PASSES["factored"], *PASSES["unfactored"]]:
        schema = str(getattr(torch.ops.came8bit, name).default._schema)
        definitions.define(schema.removeprefix("came8bit::"))
    _definitions.append(definitions)
    torch.ops.load_library(str(path))
    return Control(ctypes.CDLL(str(path)))


@functools.cache
def plain() -> Control:
    """Build and open the library without a sanitizer."""
    return load(PLAIN.make("_C_shim"))


@contextmanager
def kernels() -> Iterator[None]:
    """Within it ``_ops`` calls the loaded kernels on CPU tensors."""
    shim = getattr(torch.ops, NAMESPACE)
    loaded = {name: getattr(shim, name).default for name in OPERATORS}
    passes = {
        loaded[f"{kind}_step_"]: tuple(getattr(shim, name).default for name in names)
        for kind, names in PASSES.items()
    }
    before = {name: getattr(_ops, name) for name in [*OPERATORS, "PASSES"]}
    for name, operator in [*loaded.items(), ("PASSES", passes)]:
        setattr(_ops, name, operator)
    try:
        yield
    finally:
        for name, operator in before.items():
            setattr(_ops, name, operator)
