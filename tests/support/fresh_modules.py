"""Second copies of modules that keep something for the life of the process."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest


def fresh_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``name`` once more, as at the first import, with none of our variables set."""
    for variable in list(os.environ):
        if variable.startswith("CAME8BIT_"):
            monkeypatch.delenv(variable)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclass looks itself up
    spec.loader.exec_module(module)
    return module
