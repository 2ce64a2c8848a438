"""Whether the CUDA kernels are opened, what is said where they are not, and when.

There is no GPU here, and no CUDA build of torch: both are pretended, down to the place where the
library would be opened. ``build_tools/check_symbols.py`` opens a real one.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fresh_modules import fresh_copy
from problems import arguments_of, make_problem

from came8bit.cli import facts as info
from came8bit.ops import libraries, schema

NO_NVCC = {"built": False, "reason": "no nvcc was found", "needs_nvcc": True}
OFF = {"built": False, "reason": "CAME8BIT_CUDA=OFF was set", "needs_nvcc": False}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module that has not looked for the library yet."""
    module = fresh_copy("came8bit.ops.libraries", monkeypatch)
    monkeypatch.setattr(module.CPU, "load", lambda required_by: False)
    return module


@pytest.fixture
def cuda_torch(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that says it was built for CUDA 13.0, next to a package without the library."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fresh, "find", lambda names: None)


def load_cuda(module: ModuleType) -> libraries.KernelStatus:
    """What comes of looking for both libraries, for CUDA."""
    status: libraries.KernelStatus = module.load().cuda
    assert module.status().cuda == status
    return status


def built(module: ModuleType, cuda: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the build say this about the CUDA library."""
    note = {"kernels": True, "reason": "", "torch": "2.13", "cuda": cuda}
    monkeypatch.setattr(module, "build_info", lambda: note)


# --- what is found --------------------------------------------------------------------------------


def test_a_cpu_build_of_torch_never_opens_it(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fresh.CUDA, "_open", lambda path: pytest.fail("opened"))
    monkeypatch.setattr(fresh, "find", lambda names: "/somewhere/_C_cuda.so")
    status = load_cuda(fresh)
    assert not status.loaded
    assert status.reason == "this torch is built without CUDA"
    assert not recwarn.list  # nobody with a CPU needs to know


def test_rocm(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert load_cuda(fresh).reason == "this torch is built for ROCm"


@pytest.mark.usefixtures("cuda_torch")
def test_opened_once(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Opened:
        came8bit_cuda_architectures = staticmethod(lambda: b"sm_90 compute_90")

    def open_(path: str) -> Opened:
        opened.append(path)
        return Opened()

    monkeypatch.setattr(fresh, "find", lambda names: f"/somewhere/{names[0]}")
    monkeypatch.setattr(fresh.CUDA, "_open", open_)
    expected = fresh.KernelStatus(True, "/somewhere/_C_cuda.so", "sm_90 compute_90")
    assert load_cuda(fresh) == load_cuda(fresh) == expected
    assert opened == ["/somewhere/_C_cuda.so"]


@pytest.mark.usefixtures("cuda_torch")
def test_nothing_built_for_want_of_nvcc(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    built(fresh, NO_NVCC, monkeypatch)
    status = load_cuda(fresh)
    assert status.reason == "it was built without them (no nvcc was found)"
    assert 'pip install "cuda-toolkit[nvcc' in status.cure
    assert '==13.0.*"' in status.cure
    assert "reinstall came8bit" in status.cure


@pytest.mark.usefixtures("cuda_torch")
def test_nvcc_of_cuda_12_is_not_on_pypi(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    built(fresh, NO_NVCC, monkeypatch)
    assert "conda install -c nvidia cuda-nvcc=12.8" in load_cuda(fresh).cure


@pytest.mark.usefixtures("cuda_torch")
def test_nothing_built_because_it_was_switched_off(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(fresh, OFF, monkeypatch)
    status = load_cuda(fresh)
    assert status.reason == "it was built without them (CAME8BIT_CUDA=OFF was set)"
    assert "nvcc" not in status.cure


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ({}, "is not installed"),
        ({"kernels": False, "reason": "the moon"}, "it was built without them (the moon)"),
        ({"kernels": True, "reason": "", "cuda": {"built": True}}, "the installed came8bit has"),
    ],
)
def test_the_reasons_it_shares_with_the_other_library(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, note: dict[str, object], reason: str
) -> None:
    monkeypatch.setattr(fresh, "build_info", lambda: note)
    assert reason in load_cuda(fresh).reason


@pytest.mark.usefixtures("cuda_torch")
def test_old_torch(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert load_cuda(fresh).reason == "they need torch >= 2.10, this is torch 2.9.1+cu130"


@pytest.mark.usefixtures("cuda_torch")
def test_another_library_of_that_name(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    other = str(next(Path(torch.__file__).parent.glob("lib/*c10.*")))
    monkeypatch.setattr(fresh, "find", lambda names: other)
    status = load_cuda(fresh)
    assert f"{other} cannot be used with torch" in status.reason
    assert "reinstall" in status.cure


@pytest.mark.parametrize("value", ["cuda", "CUDA"])
def test_required(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CAME8BIT_REQUIRE_KERNELS", value)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match=r"=cuda is set, but .* without CUDA\. To get"):
        load_cuda(fresh)


def test_requiring_kernels_does_not_mean_these(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAME8BIT_REQUIRE_KERNELS", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not load_cuda(fresh).loaded


# --- the warning ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda_torch")
def test_warning_comes_once_and_late(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    built(fresh, NO_NVCC, monkeypatch)
    status = load_cuda(fresh)  # silent: a warning would be an error here
    text = "no CUDA kernels here.* many times slower: " + re.escape(status.reason)
    with pytest.warns(RuntimeWarning, match=text) as caught:
        fresh.warn_once()
    fresh.warn_once()  # it would be an error here
    assert f"To get them, {status.cure}." in str(caught[0].message)


@pytest.mark.usefixtures("cuda_torch")
def test_no_warning_where_the_reference_was_asked_for(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAME8BIT_DISABLE_KERNELS", "1")
    assert load_cuda(fresh).reason == "CAME8BIT_DISABLE_KERNELS is set"
    fresh.warn_once()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and is not."""

    is_cuda = True


@pytest.mark.parametrize("factored", [True, False])
def test_the_reference_step_asks_for_the_warning(
    monkeypatch: pytest.MonkeyPatch, factored: bool
) -> None:
    said: list[None] = []
    monkeypatch.setattr(libraries, "warn_once", lambda: said.append(None))
    problem = make_problem((8, 32), factored=factored, generator=torch.Generator().manual_seed(0))
    step = schema._KERNELS["factored_step_" if factored else "unfactored_step_"]
    for param, count in ((problem.param, 0), (problem.param.as_subclass(OnGpu), 1)):
        problem.param = param
        step(*arguments_of([problem], [torch.ones(8, 32)]).values())
        assert len(said) == count


def test_the_reference_codec_asks_for_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[None] = []
    monkeypatch.setattr(libraries, "warn_once", lambda: said.append(None))
    codes, absmax = schema._quantize(torch.ones(4, 32))
    schema._dequantize(codes, absmax)
    assert not said
    schema._quantize(torch.ones(4, 32).as_subclass(OnGpu))
    schema._dequantize(codes.as_subclass(OnGpu), absmax)
    assert len(said) == 2


# --- came8bit info --------------------------------------------------------------------------------


def info_of(
    status: libraries.KernelStatus, cuda: str | None, monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(libraries.CUDA, "_status", status)
    assert libraries.status().cuda == status
    facts = {
        "versions": info.environment.versions(),
        "git": None,
        "kernels": info.environment.kernels(),
        "reference_only": libraries.status().reference_only,
        "hardware": info.environment.hardware(),
    }
    return info.describe(facts)


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    text = info_of(libraries.KernelStatus(True, "/x/_C_cuda.so", "sm_90"), "13.0", monkeypatch)
    assert re.search(r"^CUDA kernels +loaded, sm_90\n +/x/_C_cuda.so$", text, re.MULTILINE)
    missing = libraries.KernelStatus(False, reason="no nvcc was found", cure="install it")
    text = info_of(missing, "13.0", monkeypatch)
    assert re.search(
        r"^CUDA kernels +NOT loaded: no nvcc was found\n +the reference runs instead.*\n"
        r" +to get them, install it$",
        text,
        re.MULTILINE,
    )
    text = info_of(missing, None, monkeypatch)
    assert re.search(r"^CUDA kernels +not needed: no nvcc was found$", text, re.MULTILINE)
