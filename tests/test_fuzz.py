"""Input that is damaged or makes no sense is refused by name or harmless, whatever it is, in
bounded time and memory.

``CAME8BIT_FUZZ_SEED`` chooses other inputs, ``CAME8BIT_FUZZ_SECONDS`` goes on for so long with each
kind: ``make test ARGS="tests/test_fuzz.py -rP"`` prints how many there were.
"""

import json
import os

import pytest
from paths import ROOT
from processes import run_python

SEED = os.environ.get("CAME8BIT_FUZZ_SEED", "0")
SECONDS = os.environ.get("CAME8BIT_FUZZ_SECONDS")

# The program in tests/support, what it reads, how many of them.
FUZZED = [
    ("fuzz_checkpoints", "checkpoint", 500),
    ("fuzz_checkpoints", "came-pytorch", 500),
    ("fuzz_checkpoints", "state_dict", 500),
    ("fuzz_inputs", "config", 40),
    ("fuzz_inputs", "header", 300),
    ("fuzz_inputs", "options", 200),
    ("fuzz_inputs", "arguments", 150),
]


@pytest.mark.parametrize(("program", "kind", "count"), FUZZED, ids=lambda value: str(value))
def test_strange_input_is_refused_or_harmless(program: str, kind: str, count: int) -> None:
    limits = [str(count)] if SECONDS is None else [str(10**9), SECONDS]
    script = ROOT / "tests" / "support" / f"{program}.py"
    done = run_python(script, kind, SEED, *limits, timeout=None)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, taken = json.loads(done.stdout)
    print(f"{kind}: {refused} refused, {taken} taken")
    assert SECONDS or refused + taken == count
    assert refused > 0.2 * (refused + taken)
    assert taken > 0
