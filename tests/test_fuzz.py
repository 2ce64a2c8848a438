"""Input that is damaged or makes no sense is refused by name or harmless, whatever it is, in
bounded time and memory.

``CAME8BIT_FUZZ_SEED`` chooses other inputs, ``CAME8BIT_FUZZ_TIMES`` so many times as many.
"""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

SEED = os.environ.get("CAME8BIT_FUZZ_SEED", "0")
TIMES = int(os.environ.get("CAME8BIT_FUZZ_TIMES", "1"))

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
    count *= TIMES
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / f"{program}.py", kind, SEED, str(count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, taken = json.loads(done.stdout)
    print(f"{kind}: {refused} refused, {taken} taken")
    assert refused + taken == count
    assert refused > 0.2 * count
    assert taken > 0
