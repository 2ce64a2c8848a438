"""Say where torch is installed, without importing it.

Run as ``python -I find_torch.py``: ``-I`` keeps PYTHONPATH out, through which an isolated build
hides the packages of the environment that is being installed into. Prints torch's folder and exits
0, or prints why there is none and exits 1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys


def locate() -> str | None:
    """Return the folder of the torch package this interpreter would import, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return os.path.dirname(os.path.realpath(spec.origin))


def version(folder: str) -> tuple[int, int] | None:
    """Return (major, minor) of the torch in ``folder``, or None where it does not look like one."""
    try:
        with open(os.path.join(folder, "version.py"), encoding="utf-8") as file:
            found = re.search(r"__version__ = '(\d+)\.(\d+)", file.read())
    except OSError:
        return None
    return (int(found.group(1)), int(found.group(2))) if found else None


if __name__ == "__main__":
    torch_dir = locate()
    if torch_dir is None:
        print(f"no torch in {sys.executable}", file=sys.stderr)
        sys.exit(1)
    print(torch_dir)
