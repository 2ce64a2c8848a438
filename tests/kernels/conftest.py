"""The CUDA kernels on the shim, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shim.control import Control
from shim.library import plain


@pytest.fixture(scope="session")
def library() -> Control:
    return plain()


@pytest.fixture
def shim(library: Control) -> Iterator[Control]:
    library.configure()
    library.launches()
    yield library
    library.configure()
