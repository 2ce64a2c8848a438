"""What the README and the docs show runs as it stands, and names that exist.

The Python blocks of a page are one script, from top to bottom, in an empty folder. Before it comes
the first block of ``docs/first_optimizer.md``, the model of the examples. A block of text that
follows a Python block is what the block prints; one that follows a command is among its output.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, PAGES, blocks
from paths import ROOT

import came8bit

SCRIPT = ROOT / "tests" / "support" / "doc_pages.py"
SECONDS = 300


def has_python(path: Path) -> bool:
    return any(block.language == "python" for block in blocks(path))


@pytest.mark.parametrize("page", list(filter(has_python, PAGES)), ids=lambda p: p.stem)
def test_python_of_a_page(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(page)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def commands(path: Path) -> list[str]:
    """Shell commands in fenced and indented blocks, without their comments."""
    text = path.read_text(encoding="utf-8")
    fenced = [block.text for block in blocks(path) if block.language in ("bash", "console")]
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^    (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    lines = [re.sub(r"\s+# .*", "", line).removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"(make|came8bit|python|pytest)\b", line)]


def test_targets_of_make_exist() -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    found = {
        (path.name, word)
        for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
        for text in [path.read_text(encoding="utf-8")]
        for command in [*commands(path), *re.findall(r"`(make\s[^`]+)`", text)]
        if command.startswith("make")
        for word in shlex.split(command.split("&&")[0])[1:]
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    assert len(found) > 20
    assert {(path, word) for path, word in found if word not in known} == set()


def test_modules_of_benchmarks_exist() -> None:
    for path in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(r"-m (benchmarks\.[a-z_.]+)", path.read_text(encoding="utf-8")):
            file = ROOT / name.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), (path, name)


def test_files_that_are_named_exist() -> None:
    pattern = r"`((?:came8bit|csrc|tests|benchmarks|build_tools|tools|docs)/[\w./*-]+)`"
    for path in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(pattern, path.read_text(encoding="utf-8")):
            assert list(ROOT.glob(name)), (path, name)


def test_every_public_name_has_its_place_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    found = set(re.findall(r"^::: came8bit[\w.]*\.(\w+)$", text, re.M))
    assert set(came8bit.__all__) <= found
