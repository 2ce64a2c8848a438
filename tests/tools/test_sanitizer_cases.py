"""The small cases for compute-sanitizer reach every CUDA kernel: on the shim, which counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import check_registers
import pytest
import sanitizer_cases
from paths import ROOT
from shim.build import PLAIN
from shim.library import kernels, plain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")

NEVER = {
    # For builds that have no kernels for float16; groups of known types have kernels of their own.
    "second_moment_kernel<Any, true>",
    "instability_kernel<Any, float, true>",
    "instability_kernel<Any, signed char, true>",
}


def symbols(library: Path) -> dict[int, str]:
    """Mangled names by offset."""
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in listed.stdout.splitlines()]
    return {int(line[0], 16): line[2] for line in lines if len(line) == 3}


def test_every_kernel_is_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shim = plain()
    # Which kernels a step launches does not depend on results: one block of each grid is enough.
    shim.configure(head=1, tail=0)
    found: set[int] = set()

    def record(name: str) -> None:
        run = getattr(sanitizer_cases, name)

        def recorded(*arguments: object, **options: object) -> None:
            run(*arguments, **options)
            found.update(launch.kernel for launch in shim.launches())

        monkeypatch.setattr(sanitizer_cases, name, recorded)

    record("run_ops")
    record("run_ranks")
    monkeypatch.setenv(sanitizer_cases.SMALL, "")
    try:
        with kernels():
            sanitizer_cases.main(["--device", "cpu"])
    finally:
        shim.configure()
    found.update(launch.kernel for launch in shim.launches())
    assert "is done, on cpu" in capsys.readouterr().out.splitlines()[-1]
    names = symbols(PLAIN.library("_C_shim"))
    reached = set(check_registers.readable([names[offset] for offset in found]).values())
    budget = json.loads((ROOT / "csrc" / "cuda" / "registers.json").read_text())
    assert reached == set(budget["registers"]) - NEVER
