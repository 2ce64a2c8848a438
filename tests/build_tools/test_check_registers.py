"""``build_tools/check_registers.py``: what ptxas prints against a budget. Compiles nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KERNEL = "_ZN8came8bit40_GLOBAL__N__967e08c3_8_codec_cu_6b52826d15quantize_kernelEPKfllPaPf"
NAME = "quantize_kernel"


def entry(architecture: str, registers: int, spills: int = 0, kernel: str = KERNEL) -> str:
    return f"""
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for 'sm_{architecture}'
ptxas info    : Function properties for {kernel}
    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 1024 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 33.256 ms"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import check_registers

    return check_registers


def all_of(script: ModuleType, registers: int = 30, **more: Any) -> list[Any]:
    log = "".join(entry(a, registers, **more) for a in script.ARCHITECTURES)
    return [script.Usage(NAME, *list(vars(u).values())[1:]) for u in script.usages(log)]


def budget(script: ModuleType, registers: int = 30, nvcc: str = "13.0") -> dict[str, Any]:
    return {"nvcc": nvcc, "registers": {NAME: dict.fromkeys(script.ARCHITECTURES, registers)}}


def test_what_ptxas_says(script: ModuleType) -> None:
    (use,) = script.usages(entry("90", 37, spills=4))
    assert use == script.Usage(KERNEL, "90", 37, 1024, 8)
    (use,) = script.usages(entry("90a", 37))
    assert use.architecture == "90"


def test_a_function_that_was_not_inlined_counts_for_its_kernel(script: ModuleType) -> None:
    log = entry("80", 40).replace(
        "ptxas info    : Used",
        "ptxas info    : Function properties for helper\n"
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used",
    )
    (use,) = script.usages(log)
    assert use.local_bytes == 16


def test_names_do_not_depend_on_the_build(script: ModuleType) -> None:
    other = KERNEL.replace("967e08c3", "00000000")
    assert script.readable([KERNEL]) == {KERNEL: NAME}
    assert script.readable([other]) == {other: NAME}
    template = (
        "void came8bit::apply_kernel<came8bit::Any, signed char, (came8bit::Access)2>"
        "(came8bit::Parameter const*, int, came8bit::Settings)"
    )
    assert script._short(template) == "apply_kernel<Any, signed char, Access(2)>"


def test_within_the_budget(script: ModuleType) -> None:
    assert script.problems(all_of(script), budget(script), "13.0") == []
    assert script.problems(all_of(script, 29), budget(script), "13.0") == []


def test_too_many_registers(script: ModuleType) -> None:
    wrong = script.problems(all_of(script, 31), budget(script), "13.0")
    assert len(wrong) == len(script.ARCHITECTURES)
    assert wrong[0] == f"{NAME}, sm_75: 31 registers, expected at most 30"
    # Another compiler makes other code.
    assert script.problems(all_of(script, 31), budget(script), "12.8") == []


@pytest.mark.parametrize("nvcc", ["13.0", "12.8"])
def test_spills(script: ModuleType, nvcc: str) -> None:
    wrong = script.problems(all_of(script, spills=4), budget(script), nvcc)
    assert wrong[0] == f"{NAME}, sm_75: 8 bytes of local memory"


def test_everything_is_compiled_and_listed(script: ModuleType) -> None:
    wrong = script.problems(all_of(script)[1:], budget(script), "13.0")
    assert wrong == ["nothing was compiled for sm_75"]
    stranger = {"nvcc": "13.0", "registers": {"gone": {"75": 1}}}
    wrong = script.problems(all_of(script), stranger, "13.0")
    assert f"{NAME}, sm_75: not in registers.json" in wrong[0]
    assert "registers.json lists gone, which is gone" in wrong[-1]


def test_flags(script: ModuleType, tmp_path: Path) -> None:
    def commands(flags: str) -> None:
        lines = [{"file": f"/x/{name}", "command": f"c {flags}"} for name in ("a.cu", "b.cpp")]
        (tmp_path / "compile_commands.json").write_text(json.dumps(lines))

    commands(" ".join(script.EXACT))
    assert script.flag_problems(tmp_path) == []
    commands(" ".join(script.EXACT[1:]) + " -use_fast_math")
    assert script.flag_problems(tmp_path) == [
        "a.cu is compiled without --fmad=false",
        "a.cu is compiled with fast math",
    ]


def test_the_budget_in_the_repository(script: ModuleType) -> None:
    content = json.loads(script.BUDGET.read_text())
    assert content["registers"]
    for rows in content["registers"].values():
        assert list(rows) == list(script.ARCHITECTURES)
        assert all(0 < count <= 255 for count in rows.values())
    sys.modules.pop("check_registers", None)
