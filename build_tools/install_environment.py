"""Virtual environments for :mod:`check_install`: what is installed into one, and what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Not linked: what is under test, what builds it, and what every environment has of its own.
NOT_LINKED = (
    "came8bit",
    "_editable",
    "scikit_build_core",
    "cmake",
    "ninja",
    "pip",
    "__pycache__",
    "uv",
)
OWN_VARIABLES = ("CAME8BIT_", "SKBUILD_", "PYTHONPATH", "VIRTUAL_ENV", "CUDA")

PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import came8bit
    from came8bit.ops import libraries
status = libraries.status().cpu
print(json.dumps({
    "loaded": status.loaded, "path": status.path, "reason": status.reason,
    "file": came8bit.__file__,
    "cuda": vars(libraries.status().cuda), "build": libraries.build_info(),
    "warnings": [str(w.message) for w in caught if "came8bit" in str(w.message)],
}))
"""


@dataclass
class Environment:
    """A virtual environment and the sources that are installed into it."""

    folder: Path
    source: Path
    report: str = ""

    @property
    def bin(self) -> Path:
        """The folder of the environment's programs."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return str(self.bin / "python")

    def run(self, *command: str, fails: bool = False, **variables: str) -> str:
        """Run ``command`` outside the sources and return its output; raise if it ends otherwise."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**clean, "PWD": str(self.folder), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if (done.returncode != 0) != fails:
            what = "succeeded" if fails else "failed"
            raise AssertionError(
                f"{' '.join(command)} {what}, which was not expected:\n{done.stdout}"
            )
        return done.stdout

    def pip(self, *arguments: str, fails: bool = False, **variables: str) -> str:
        """Run pip in the environment."""
        quiet = ("--disable-pip-version-check", "--no-input")
        return self.run(self.python, "-m", "pip", *arguments, *quiet, fails=fails, **variables)

    def probe(self) -> dict[str, object]:
        """Import the installed package and return what it says about its kernels."""
        found: dict[str, object] = json.loads(self.run(self.python, "-c", PROBE).splitlines()[-1])
        self.report = str(found["path"] or found["reason"])
        return found

    def expect_kernels(self) -> None:
        """Check that kernels are loaded, without a warning, and that ``came8bit info`` says so."""
        found = self.probe()
        assert found["loaded"], found
        assert not found["warnings"], found
        assert str(found["path"]).startswith(str(self.folder)), found
        info = self.run(str(self.bin / "came8bit"), "info")
        assert str(found["path"]) in info, info
        # Next to a CPU build of torch the CUDA library is neither opened nor missed.
        if torch.version.cuda is None:
            assert found["cuda"]["reason"] == "this torch is built without CUDA", found  # type: ignore[index]
            assert "not needed: this torch is built without CUDA" in info, info

    def expect_cuda(self, built: bool, reason: str = "") -> None:
        """Check that the build noted whether the CUDA library is built, and why not."""
        found = self.probe()
        note = found["build"]["cuda"]  # type: ignore[index]
        assert note["built"] is built, note
        assert reason in note["reason"], (reason, note)
        library = Path(str(found["path"])).with_name("_C_cuda.so")
        assert library.exists() is built, library

    def torch_for(self, cuda: str) -> str:
        """Return the installed torch under another name, as if it was built for ``cuda``."""
        real = self.folder.parent / "packages" / "torch"
        folder = self.folder / f"torch-{cuda}"
        folder.mkdir(exist_ok=True)
        for name in ("include", "lib"):
            (folder / name).symlink_to(real / name)
        text = (real / "version.py").read_text(encoding="utf-8")
        text = re.sub(r"(?m)^cuda\b.*$", f"cuda = {cuda!r}", text)
        (folder / "version.py").write_text(text, encoding="utf-8")
        return str(folder)

    def expect_pure(self, reason: str) -> None:
        """Check that the package works without kernels, warns once and says why."""
        found = self.probe()
        assert not found["loaded"], found
        assert reason.lower() in str(found["reason"]).lower(), (reason, found)
        assert len(found["warnings"]) == 1, found  # type: ignore[arg-type]
        assert str(found["reason"]) in found["warnings"][0], found  # type: ignore[index]
        info = self.run(self.python, "-W", "ignore", "-m", "came8bit", "info")
        assert reason.lower() in " ".join(info.lower().split()), info
        # Required at run time, its absence is an error, not a warning.
        refused = self.run(
            self.python, "-c", "import came8bit", fails=True, CAME8BIT_REQUIRE_KERNELS="1"
        )
        assert "ImportError" in refused, refused
        assert "came8bit" in self.run(
            self.python,
            "-W",
            "error",
            "-c",
            "import came8bit; print(came8bit)",
            CAME8BIT_DISABLE_KERNELS="1",
        )


def collect_packages(folder: Path) -> None:
    """Fill ``folder`` with links to the packages next to torch, but for NOT_LINKED."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "run this with a Python that has torch"
    assert spec.origin is not None
    folder.mkdir()
    for entry in Path(spec.origin).parent.parent.iterdir():
        if not entry.name.lower().startswith(NOT_LINKED) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)


def lend_packages(environment: Environment, folder: Path) -> None:
    """Let ``environment`` import what is in ``folder``.

    By name in a .pth file and not by links among its own packages: installers write to those, and
    would replace files of the environment behind the links.
    """
    own = sysconfig.get_path("purelib", scheme="venv", vars={"base": str(environment.folder)})
    Path(own, "lent.pth").write_text(f"{folder}\n", encoding="utf-8")
