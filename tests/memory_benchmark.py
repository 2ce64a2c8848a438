"""``benchmarks/bench_activations.py`` as the module ``bench``: its counters serve tests, too."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_activations.py"
_SPEC = importlib.util.spec_from_file_location("bench_activations", _PATH)
bench = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = bench
_SPEC.loader.exec_module(bench)
