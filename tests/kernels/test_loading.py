"""Finding, opening and refusing the compiled kernels; each case in a Python of its own.

What is loaded cannot be unloaded, and operators can be defined once only: so the cases that need
another outcome start a new interpreter, or take a fresh copy of the module that opens nothing.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fresh_modules import fresh_copy

from came8bit.ops import libraries

PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import came8bit
    from came8bit.ops import libraries
    libraries.load()  # once more: it must not warn again
status = libraries.status().cpu
mine = [str(w.message) for w in caught if "compiled CPU kernels" in str(w.message)]
print(json.dumps({"loaded": status.loaded, "isa": status.isa, "reason": status.reason,
                  "warnings": mine, "isas": libraries.supported_cpu_isas()}))
"""


def start(code: str = PROBE, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new Python with only these of the package's variables set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CAME8BIT_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def probe(**variables: str) -> dict[str, Any]:
    """Import the package in a new Python and return what PROBE finds."""
    done = start(**variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module that has not looked for the kernels yet."""
    return fresh_copy("came8bit.ops.libraries", monkeypatch)


def refusal(module: ModuleType) -> str:
    """Load, expect the one warning and no kernels, and return the warning."""
    with pytest.warns(RuntimeWarning) as caught:
        status = module.load()
    assert not status.cpu.loaded
    assert status.cpu.path is None
    assert status.cpu.isa is None
    (warning,) = caught
    text = str(warning.message)
    assert status.cpu.reason in text
    assert f"To get them, {status.cpu.cure}." in text
    assert module.load() == status  # and no second warning: it would be an error here
    return text


def test_loaded_here_with_the_best_isa() -> None:
    """The tests are about the kernels: an environment without them has to be put right first."""
    found = probe()
    assert found["loaded"], found["reason"]
    assert found["warnings"] == []
    assert found["isa"] == found["isas"][-1]
    assert found["isas"] == list(libraries.CPU_ISAS[: len(found["isas"])])


def test_library_is_found_through_the_package_path() -> None:
    path = Path(str(libraries.status().cpu.path))
    spec = importlib.util.find_spec("came8bit")
    assert spec is not None
    assert str(path.parent) in list(spec.submodule_search_locations or [])


@pytest.mark.parametrize("isa", libraries.CPU_ISAS)
def test_isa_from_the_environment(isa: str) -> None:
    if isa in libraries.supported_cpu_isas():
        assert probe(CAME8BIT_CPU_ISA=isa)["isa"] == isa
    else:
        done = start(CAME8BIT_CPU_ISA=isa)
        assert done.returncode != 0
        assert f"CAME8BIT_CPU_ISA: {isa!r} is not supported" in done.stderr


def test_unknown_isa_in_the_environment() -> None:
    done = start(CAME8BIT_CPU_ISA="sse9")
    assert done.returncode != 0
    message = "ValueError: CAME8BIT_CPU_ISA: got 'sse9', expected one of baseline, avx2, avx512"
    assert message in done.stderr


def test_set_cpu_isa() -> None:
    before = libraries.cpu_isa()
    try:
        for isa in libraries.supported_cpu_isas():
            libraries.set_cpu_isa(isa)
            assert libraries.cpu_isa() == isa
            assert libraries.status().cpu.isa == isa
        with pytest.raises(ValueError, match="got 'mmx', expected one of"):
            libraries.set_cpu_isa("mmx")
        assert libraries.cpu_isa() == libraries.supported_cpu_isas()[-1]
    finally:
        libraries.set_cpu_isa(before)


def test_isa_that_the_machine_lacks() -> None:
    """Asked of a library that says it has nothing but the baseline."""

    class Baseline:
        came8bit_cpu_best_isa = staticmethod(lambda: 0)
        came8bit_cpu_set_isa = staticmethod(lambda number: 0 if number == 0 else -1)

    libraries._set_isa(Baseline(), "baseline", source="test")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"'avx512' is not supported .* available: baseline$"):
        libraries._set_isa(Baseline(), "avx512", source="test")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["CAME8BIT_DISABLE_KERNELS", "CAME8BIT_PURE"])
def test_reference_on_request_is_silent(name: str) -> None:
    found = probe(**{name: "1"})
    assert not found["loaded"]
    assert found["warnings"] == []
    assert name in found["reason"]
    assert found["isas"] == []


@pytest.mark.parametrize("value", ["0", "", "false", "no", "OFF"])
def test_variables_can_be_switched_off(value: str) -> None:
    assert probe(CAME8BIT_DISABLE_KERNELS=value, CAME8BIT_PURE=value)["loaded"]


def test_required_kernels_that_are_disabled() -> None:
    done = start(CAME8BIT_REQUIRE_KERNELS="1", CAME8BIT_DISABLE_KERNELS="1")
    assert done.returncode != 0
    assert "ImportError: CAME8BIT_REQUIRE_KERNELS is set, but" in done.stderr
    assert "unset CAME8BIT_DISABLE_KERNELS" in done.stderr


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu128", "1.13.0"])
def test_old_torch(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert f"they need torch >= 2.10, this is torch {version}" in refusal(fresh)


def test_nothing_found_and_not_installed(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fresh, "find", lambda names: None)
    monkeypatch.setattr(fresh, "build_info", dict)
    assert "is not installed" in refusal(fresh)


def test_nothing_found_because_it_was_built_so(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "find", lambda names: None)
    monkeypatch.setattr(fresh, "build_info", lambda: {"kernels": False, "reason": "the moon"})
    assert "it was built without them (the moon)" in refusal(fresh)


def test_nothing_found_because_the_sources_shadow_it(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "find", lambda names: None)
    note = {"kernels": True, "reason": "", "cuda": {"built": True, "reason": ""}}
    monkeypatch.setattr(fresh, "build_info", lambda: note)
    assert "start Python in another folder" in refusal(fresh)


def test_file_that_is_no_library(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(fresh, "find", lambda names: str(broken))
    assert str(broken) in refusal(fresh)


def test_library_without_the_functions(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other shared library will do as one of another version."""
    other = next(Path(torch.__file__).parent.glob("lib/*c10.*"))
    monkeypatch.setattr(fresh, "find", lambda names: str(other))
    assert "cannot be used with torch" in refusal(fresh)


def test_questions_before_loading(fresh: ModuleType) -> None:
    assert not fresh.status().cpu.loaded
    assert fresh.supported_cpu_isas() == []
    for question in (fresh.cpu_isa, lambda: fresh.set_cpu_isa("baseline")):
        with pytest.raises(RuntimeError, match="not been looked for yet"):
            question()


def test_status_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        libraries.status().cpu.loaded = False  # type: ignore[misc]


def test_build_info_is_in_the_installed_metadata() -> None:
    info = libraries.build_info()
    assert info["kernels"] is True
    assert info["reason"] == ""
    assert str(info["torch"]).startswith("2.")
    assert info["cuda"]["built"] is not bool(info["cuda"]["reason"])
