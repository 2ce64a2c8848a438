"""Programs that tests run in a Python of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(
    *words: object, cwd: Path | None = None, timeout: float | None = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` with ``variables`` in its environment; its output is text."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
