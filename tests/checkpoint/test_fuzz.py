"""Damaged files are refused by name or harmless: whatever the damage, in bounded time and memory.

``CAME8BIT_FUZZ_SEED`` and ``CAME8BIT_FUZZ_COUNT`` choose other files, and more.
"""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

SEED = os.environ.get("CAME8BIT_FUZZ_SEED", "0")
COUNT = os.environ.get("CAME8BIT_FUZZ_COUNT", "500")


@pytest.mark.parametrize("kind", ["checkpoint", "came-pytorch", "state_dict"])
def test_damaged_files_are_refused_or_harmless(kind):
    program = ROOT / "tests" / "support" / "fuzz_checkpoints.py"
    done = subprocess.run(
        [sys.executable, str(program), kind, SEED, COUNT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, taken = json.loads(done.stdout)
    print(f"{kind}: {refused} files refused, {taken} taken")
    assert refused + taken == int(COUNT)
    assert refused > 0.2 * int(COUNT)
