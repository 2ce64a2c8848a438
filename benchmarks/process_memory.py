"""Memory of a process as Linux reports it, and measurements in processes of their own."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which glibc gives back each block that is freed."""


def status(field: str, pid: int | str = "self") -> int:
    """Return the bytes reported of a process: ``VmSize``, ``VmPeak``, ``VmRSS``, ``VmHWM``."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    match = re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/{pid}/status does not say {field}: this needs Linux")
    return int(match[1]) * 1024


def reset_peak() -> None:
    """Set the peak of this process' resident memory back to what is in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_of(work: Callable[[], object]) -> int:
    """Return by how many bytes ``work`` raises the resident memory, at its peak."""
    # Memory that was freed but not given back would be used again without being seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = status("VmRSS")
    reset_peak()
    work()
    return max(0, status("VmHWM") - before)


def in_a_process(code: str, question: object, **environment: str) -> Any:
    """Run ``code``, which finds ``question`` and leaves ``answer``, in a process of its own."""
    program = (
        "import json, sys\n"
        "from benchmarks.process_memory import peak_of, reset_peak, status\n"
        "question = json.loads(sys.argv[1])\n"
        f"{textwrap.dedent(code)}\n"
        "print(json.dumps(answer))\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(question)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
