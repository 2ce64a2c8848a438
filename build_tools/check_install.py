"""Install the package in every way that is promised, each in a virtual environment of its own.

Installing torch ten times would take an hour, so the environments link to the packages of the one
that runs this script: to all but came8bit and the build tools, so that a failed installation has
nothing to fall back on. The sources are copied first, so that nothing next to them helps either.

They download build tools. One that fails is tried once more, alone, and both outcomes are shown:
an index that did not answer is worth a look, but is not a way to install that does not work.

    python build_tools/check_install.py            all of them
    python build_tools/check_install.py uv pure    those whose name contains one of the words
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from install_environment import Environment, collect_packages, lend_packages

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "data", "results", "__pycache__", ".*_cache", "*.so"
)
# How to install depends neither on how well the compiler optimizes nor on instruction sets, and
# these take most of the time.
QUICK = {
    "SKBUILD_CMAKE_BUILD_TYPE": "Debug",
    "SKBUILD_CMAKE_DEFINE": "isa_avx2_compiles=0;isa_avx512_compiles=0",
}


def nvcc_release() -> str:
    """Return the release of the nvcc on PATH, "13.0", or ''."""
    program = shutil.which("nvcc")
    if program is None:
        return ""
    text = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False
    ).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else ""


def isolated(env: Environment) -> None:
    """Plain ``pip install .``."""
    env.pip("install", str(env.source))
    env.expect_kernels()


def without_isolation(env: Environment) -> None:
    """From a source distribution, with build tools that are already there."""
    env.pip("install", "scikit-build-core", "cmake", "ninja")
    env.run(
        env.python,
        "-c",
        "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, 'build_tools');"
        "import build_backend; build_backend.build_sdist(sys.argv[2])",
        str(env.source),
        str(env.folder / "sdist"),
    )
    (archive,) = (env.folder / "sdist").iterdir()
    env.pip("install", "--no-build-isolation", str(archive), **QUICK)
    env.expect_kernels()


def editable(env: Environment) -> None:
    """``pip install -e .``: the sources stay where they are, the library is found all the same."""
    env.pip("install", "--editable", str(env.source), **QUICK)
    env.expect_kernels()
    env.expect_cuda(False, "is built without CUDA" if torch.version.cuda is None else "")
    assert str(env.probe()["file"]).startswith(str(env.source))
    # In the folder of the sources, too, where the package without its library comes first.
    output = env.run(
        env.python,
        "-c",
        "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, '');"
        "import came8bit; status = came8bit.kernel_status(); assert status.cpu.loaded, status",
        str(env.source),
        CAME8BIT_REQUIRE_KERNELS="1",
    )
    assert not output, output


def _uv_install(env: Environment, *arguments: str, fails: bool = False, **variables: str) -> str:
    """Run ``uv pip install``, without dependencies: uv does not see the lent packages."""
    folder = env.folder / "uv"
    if not folder.exists():
        env.pip("install", "--target", str(folder), "uv")
    program = shutil.which("uv", path=folder / "bin")
    assert program is not None
    variables |= QUICK | {"UV_CACHE_DIR": str(env.folder / "cache")}
    install = (program, "pip", "install", "--no-deps", str(env.source), *arguments)
    return env.run(*install, fails=fails, **variables)


def uv_in_active_environment(env: Environment) -> None:
    """``uv pip install .`` where the environment is active: torch is found through PATH."""
    path = f"{env.bin}{os.pathsep}{os.environ['PATH']}"
    _uv_install(env, PATH=path, VIRTUAL_ENV=str(env.folder))
    env.expect_kernels()


def uv_with_torch_named(env: Environment) -> None:
    """``uv pip install --python ... .`` from elsewhere, torch named; one that no nvcc fits."""
    into = ("--python", env.python)
    wrong = _uv_install(env, *into, fails=True, CAME8BIT_TORCH_DIR="/nowhere")
    assert "CAME8BIT_TORCH_DIR=/nowhere is not" in wrong, wrong
    torch_dir = env.torch_for("99.0")
    wrong = _uv_install(env, *into, fails=True, CAME8BIT_TORCH_DIR=torch_dir, CAME8BIT_CUDA="ON")
    why = "the major versions have to be the same" if nvcc_release() else "no nvcc was found"
    assert why in " ".join(wrong.split()), wrong
    _uv_install(env, *into, CAME8BIT_TORCH_DIR=torch_dir)
    env.expect_kernels()
    env.expect_cuda(False, why)


def with_cuda(env: Environment) -> None:
    """Next to a CUDA torch that nvcc fits: both libraries; the second is not opened without it."""
    release = nvcc_release()
    if not release:
        env.report = "not run: no nvcc found"
        return
    named = {"CAME8BIT_TORCH_DIR": env.torch_for(release), "CUDAARCHS": "75-real"}
    env.pip("install", str(env.source), CAME8BIT_CUDA="ON", **named, **QUICK)
    env.expect_kernels()
    env.expect_cuda(True)


def broken_nvcc(env: Environment) -> None:
    """Install next to an nvcc that does not work: the CPU library alone, or an error if asked."""
    nvcc = env.folder / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo release 13.0 || exit 1\n')
    nvcc.chmod(0o755)
    named = {"CAME8BIT_TORCH_DIR": env.torch_for("13.0"), "CUDACXX": str(nvcc)}
    refused = env.pip("install", str(env.source), fails=True, CAME8BIT_CUDA="ON", **named, **QUICK)
    assert "CAME8BIT_CUDA=ON, and the kernels were not built" in refused, refused
    output = env.pip("install", "-v", str(env.source), **named, **QUICK)
    assert "building again WITHOUT CUDA kernels" in output, output
    env.expect_kernels()
    env.expect_cuda(False, "their build failed: ")


def no_compiler(env: Environment) -> None:
    """Without a C++ compiler: a pure wheel; an error where the kernels are required."""
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    refused = env.pip(
        "install", str(env.source), fails=True, CAME8BIT_REQUIRE_KERNELS="1", **broken
    )
    assert "no working C++ compiler" in refused, refused
    env.pip("install", str(env.source), **broken)
    env.expect_pure("no working C++ compiler")


def no_cmake(env: Environment) -> None:
    """Without CMake, where no isolated build can fetch it."""
    env.pip("install", "scikit-build-core")
    env.pip("install", "--no-build-isolation", str(env.source), PATH=str(env.bin))
    env.expect_pure("cmake")


def compile_error(env: Environment) -> None:
    """Install sources that do not compile: the first error is the reason."""
    source = env.folder / "broken"
    shutil.copytree(env.source, source)
    with (source / "csrc" / "cpu" / "dispatch.cpp").open("a") as file:
        file.write("\n#error broken on purpose\n")
    env.pip("install", str(source), **QUICK)
    env.expect_pure("broken on purpose")


def pure(env: Environment) -> None:
    """Asked for: nothing is compiled, the wheel fits every platform."""
    output = env.pip("install", "-v", str(env.source), CAME8BIT_PURE="1")
    assert "py3-none-any" in output, output
    env.expect_pure("CAME8BIT_PURE=1")


def no_torch(env: Environment) -> None:
    """No torch anywhere: an isolated build asks for one, any other says what to do."""
    env.pip("install", "scikit-build-core", "cmake", "ninja")
    refused = env.pip(
        "install",
        "--no-build-isolation",
        "--no-deps",
        str(env.source),
        fails=True,
        PATH=str(env.bin),
    )
    assert "CAME8BIT_TORCH_DIR" in refused, refused
    assert "CAME8BIT_PURE=1" in refused, refused
    ask = (
        "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, 'build_tools');"
        "import build_backend; print(build_backend.get_requires_for_build_wheel())"
    )
    output = env.run(env.python, "-c", ask, str(env.source), PATH=str(env.bin))
    assert "torch>=2.10" in output, output
    output = env.run(env.python, "-c", ask, str(env.source), PATH=str(env.bin), CAME8BIT_PURE="1")
    assert "torch" not in output, output


VARIANTS: tuple[Callable[[Environment], None], ...] = (
    isolated,
    without_isolation,
    editable,
    uv_in_active_environment,
    uv_with_torch_named,
    with_cuda,
    broken_nvcc,
    no_compiler,
    no_cmake,
    compile_error,
    pure,
    no_torch,
)


def check(variant: Callable[[Environment], None], folder: Path, source: Path) -> str:
    """Run one variant in a new environment; return '' or what went wrong."""
    start = time.monotonic()
    env = Environment(folder / variant.__name__, source)
    problem = ""
    try:
        venv.create(env.folder, clear=True, with_pip=True)
        if variant is not no_torch:
            lend_packages(env, folder / "packages")
        variant(env)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(env.folder, ignore_errors=True)
    took = f"({time.monotonic() - start:.0f} s)"
    result = f"FAILED: {problem}" if problem else env.report or "as expected"
    print(f"{variant.__name__}: {variant.__doc__}\n    {result} {took}", flush=True)
    return problem


def main(words: list[str]) -> int:
    """Run the variants whose name contains one of ``words``, or all of them."""
    chosen = [v for v in VARIANTS if not words or any(word in v.__name__ for word in words)]
    if not chosen:
        print(f"no such variant; there are {', '.join(v.__name__ for v in VARIANTS)}")
        return 2
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max_workers=2) as pool:
        folder = Path(temporary)
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=NOT_COPIED)
        collect_packages(folder / "packages")
        problems = list(pool.map(lambda variant: check(variant, folder, source), chosen))
        again = [variant for variant, problem in zip(chosen, problems, strict=True) if problem]
        if again:
            print(f"once more: {', '.join(variant.__name__ for variant in again)}", flush=True)
        failed = [variant.__name__ for variant in again if check(variant, folder, source)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} ways to install work")
    if failed:
        print(f"failed twice: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
