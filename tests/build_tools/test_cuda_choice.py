"""How the build decides about the CUDA library: by pretended torches, nvccs and GPUs.

``csrc/cmake/cuda_choice.cmake`` runs in CMake's script mode; nothing is compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

CHOICE = ROOT / "csrc" / "cmake" / "cuda_choice.cmake"
CMAKE = shutil.which("cmake")

SCRIPT = """
cmake_minimum_required(VERSION 3.21)
set(cuda_sources step.cu)
include("{choice}")
came8bit_choose_cuda()
message("reason=${{came8bit_cuda_reason}}")
message("nvcc=${{came8bit_nvcc}}")
message("architectures=${{came8bit_cuda_architectures}}")
"""

ALL = [f"{a}-real" for a in (75, 80, 86, 89, 90, 100, 120)]

pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake on PATH")


class Machine:
    """A folder that pretends to be a machine; only what is put there can be found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()

    def program(self, path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def nvcc(self, path: Path | None = None, release: str = "13.0", codes: str = "") -> Path:
        codes = codes or "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121"
        lines = codes.replace(" ", "\\n")
        script = (
            'case "$1" in\n'
            f'  --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
            f"  --list-gpu-code) printf '{lines}\\n';;\n"
            "esac"
        )
        return self.program(path or self.bin / "nvcc", script)

    def gpus(self, *capabilities: str) -> None:
        self.program(self.bin / "nvidia-smi", "\n".join(f"echo {c}" for c in capabilities))

    def torch(self, cuda: str | None) -> Path:
        folder = self.folder / "site" / "torch"
        folder.mkdir(parents=True)
        value = "None" if cuda is None else repr(cuda)
        text = f"__version__ = '2.13.0'\ncuda: Optional[str] = {value}\nhip: Optional[str] = None\n"
        (folder / "version.py").write_text(text)
        return folder

    def choose(self, mode: str = "AUTO", **variables: str) -> dict[str, str]:
        """Run the script and return what it says."""
        script = self.folder / "choose.cmake"
        script.write_text(SCRIPT.format(choice=CHOICE))
        torch = self.folder / "site" / "torch"
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CAME8BIT_"))}
        done = subprocess.run(
            [
                str(CMAKE),
                f"-DCAME8BIT_CUDA={mode}",
                f"-DCAME8BIT_TORCH_DIR={torch}",
                f"-Dcame8bit_cuda_root={self.folder}/cuda",
                "-P",
                str(script),
            ],
            env={**keep, "PATH": str(self.bin), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "=" in line]
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_fits(machine: Machine) -> None:
    machine.torch("13.0")
    nvcc = machine.nvcc()
    machine.gpus("9.0")
    found = machine.choose()
    assert found == {"reason": "", "nvcc": str(nvcc), "architectures": "90-real;90-virtual"}


def test_cpu_torch(machine: Machine) -> None:
    machine.torch(None)
    machine.nvcc()
    for mode in ("AUTO", "ON"):
        assert (
            "torch they would be compiled against is built without CUDA"
            in (machine.choose(mode)["reason"])
        )


@pytest.mark.parametrize("mode", ["compile-only", "release"])
@pytest.mark.parametrize("cuda", [None, "12.8", "13.0"])
def test_any_torch_will_do_to_compile(machine: Machine, mode: str, cuda: str | None) -> None:
    machine.torch(cuda)
    machine.nvcc()
    machine.gpus("9.0")  # of no matter: the library is for others
    ptx = ["120-virtual"] if mode == "release" else []
    found = machine.choose(mode)
    assert found["reason"] == ""
    assert found["architectures"].split(";") == ALL + ptx


def test_no_nvcc(machine: Machine) -> None:
    machine.torch("13.0")
    assert machine.choose()["reason"] == "no nvcc was found"


@pytest.mark.parametrize(("torch", "nvcc"), [("12.8", "13.0"), ("13.0", "12.9"), ("13.0", "11.8")])
def test_another_major_version(machine: Machine, torch: str, nvcc: str) -> None:
    machine.torch(torch)
    path = machine.nvcc(release=nvcc)
    assert machine.choose()["reason"] == (
        f"{path} is of CUDA {nvcc}, torch is built for CUDA {torch}: "
        "the major versions have to be the same"
    )


@pytest.mark.parametrize(("torch", "nvcc"), [("12.4", "12.9"), ("13.2", "13.0")])
def test_another_minor_version(machine: Machine, torch: str, nvcc: str) -> None:
    machine.torch(torch)
    machine.nvcc(release=nvcc)
    assert machine.choose()["reason"] == ""


def test_nvcc_that_does_not_work(machine: Machine) -> None:
    machine.torch("13.0")
    broken = machine.program(machine.bin / "nvcc", "exit 1")
    assert machine.choose()["reason"].startswith(f"{broken} does not work, torch is built for CUDA")
    assert machine.choose("release")["reason"] == (
        f"{broken} does not work, and no other nvcc was found"
    )


def test_the_one_that_fits_is_taken(machine: Machine) -> None:
    """PyPI, CUDA_HOME, PATH, the usual place: the first of the right release."""
    torch = machine.torch("13.0")
    machine.nvcc(release="12.9")
    usual = machine.nvcc(machine.folder / "cuda-13.1" / "bin" / "nvcc", release="13.1")
    assert machine.choose()["nvcc"] == str(usual)
    home = machine.nvcc(machine.folder / "home" / "bin" / "nvcc")
    assert machine.choose(CUDA_HOME=str(home.parent.parent))["nvcc"] == str(home)
    pypi = machine.nvcc(torch.parent / "nvidia" / "cu13" / "bin" / "nvcc")
    assert machine.choose(CUDA_HOME=str(home.parent.parent))["nvcc"] == str(pypi)


def test_a_named_nvcc_is_the_only_one(machine: Machine) -> None:
    machine.torch("13.0")
    machine.nvcc()
    named = machine.nvcc(machine.folder / "named" / "nvcc", release="12.8")
    assert machine.choose(CUDACXX=str(named))["reason"].startswith(
        f"{named} is of CUDA 12.8, torch"
    )


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (["8.6", "8.6", "12.1"], "86-real;121-real;121-virtual"),
        (["6.1", "9.0"], "90-real;90-virtual"),
        (["15.0"], "121-virtual"),  # newer than nvcc: PTX
        (["8.0", "15.0"], "80-real;121-virtual"),
        (["No devices were found"], ";".join([*ALL, "120-virtual"])),
        ([], ";".join([*ALL, "120-virtual"])),
    ],
    ids=str,
)
def test_architectures(machine: Machine, gpus: list[str], expected: str) -> None:
    machine.torch("13.0")
    machine.nvcc()
    if gpus:
        machine.gpus(*gpus)
    assert machine.choose()["architectures"] == expected


def test_gpus_too_old_for_nvcc(machine: Machine) -> None:
    machine.torch("13.0")
    nvcc = machine.nvcc()
    machine.gpus("6.1", "5.2")
    assert machine.choose()["reason"] == (
        f"{nvcc} has no code for this machine's GPUs (compute capability 6.1, 5.2), "
        "it begins with sm_75"
    )


def test_old_nvcc_leaves_newer_gpus_to_ptx(machine: Machine) -> None:
    machine.torch("12.4")
    machine.nvcc(release="12.4", codes="sm_50 sm_60 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a")
    found = machine.choose("release")["architectures"]
    assert found == "75-real;80-real;86-real;89-real;90-real;90-virtual"


def test_switched_off(machine: Machine) -> None:
    machine.torch("13.0")
    machine.nvcc()
    assert machine.choose("OFF")["reason"] == "CAME8BIT_CUDA=OFF was set"
    why = "their build failed: step.cu(7): error: the moon"
    assert machine.choose("OFF", CAME8BIT_CUDA_REASON=why)["reason"] == why
