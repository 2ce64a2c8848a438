"""Opens a build of the kernels and puts them in the place of the package's operators."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from came8bit.ops import schema as _ops

from .build import PLAIN
from .control import Control

NAMESPACE = "came8bit_shim"
OPERATORS = ("factored_step_", "unfactored_step_", "quantize_blockwise", "dequantize_blockwise")

_definitions: list[torch.library.Library] = []


def load(path: Path | str) -> Control:
    """Open ``_C_shim``; its operators have the schemas of the package's. Once in a process."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in OPERATORS:
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
    before = {name: getattr(_ops, name) for name in OPERATORS}
    for name in OPERATORS:
        setattr(_ops, name, getattr(getattr(torch.ops, NAMESPACE), name).default)
    try:
        yield
    finally:
        for name, operator in before.items():
            setattr(_ops, name, operator)
