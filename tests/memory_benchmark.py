"""``benchmarks/planner.py`` as the module ``bench``: its counters serve tests, too."""

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, _FOLDER)  # they import each other as scripts do
try:
    import planner as bench
finally:
    sys.path.remove(_FOLDER)

__all__ = ["bench"]
