"""Studies that take seconds, for the tests of ``came8bit tradeoff``."""

import json

SMALL = ["--steps", "4", "--layers", "1", "--width", "64", "--heads", "2", "--context", "16"]
SMALL += ["--batch-size", "2", "--eval-items", "16", "--seeds", "2"]


def read(folder):
    return json.loads((folder / "results.json").read_text())
