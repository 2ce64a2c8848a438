"""What the README and the docs show runs as it stands, and names that exist.

The Python blocks of a page are one script, from top to bottom, in an empty folder. Before it comes
the first block of ``docs/first_optimizer.md``, the model of the examples. A block of text that
follows a Python block is what the block prints; one that follows a command is among its output.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS, PAGES, PRELUDE, blocks
from paths import ROOT
from processes import run_python
from transformers import GPT2Config, GPT2LMHeadModel

import came8bit
from came8bit.cli import build_parser, main

SCRIPT = ROOT / "tests" / "support" / "doc_pages.py"


def has_python(path: Path) -> bool:
    return any(block.language == "python" for block in blocks(path))


@pytest.mark.parametrize("page", list(filter(has_python, PAGES)), ids=lambda p: p.stem)
def test_python_of_a_page(page: Path, tmp_path: Path) -> None:
    done = run_python(SCRIPT, page, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def commands(path: Path) -> list[str]:
    """Shell commands in fenced and indented blocks, without their comments."""
    text = path.read_text(encoding="utf-8")
    fenced = [block.text for block in blocks(path) if block.language in ("bash", "console")]
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^    (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    lines = [re.sub(r"\s+# .*|^(\$ |[A-Z0-9_]+=\S+ )+", "", line) for line in lines]
    return [line for line in lines if re.match(r"(make|came8bit|python|pytest)\b", line)]


def commands_of(program: str) -> list[str]:
    """Return every command of ``program`` in the blocks of README and docs, once."""
    found = {command for path in PAGES for command in commands(path)}
    return sorted(command for command in found if command.startswith(program))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that commands in the docs name."""
    folder = tmp_path_factory.mktemp("files")
    names: dict[str, Any] = {}
    exec(next(blocks(PRELUDE)).text, names)
    optimizer = came8bit.CAME32bit(names["model"].named_parameters())
    names["loss_of"](names["model"], names["batches"][0]).backward()
    optimizer.step()
    came8bit.save_checkpoint(optimizer, folder / "old.safetensors")
    (folder / "path" / "to").mkdir(parents=True)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=128)
    config.architectures = ["GPT2LMHeadModel"]
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "path" / "to", max_shard_size="5MB")
    return folder


@pytest.mark.parametrize("command", commands_of("came8bit"))
def test_command(command: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs; what takes minutes is only parsed."""
    monkeypatch.chdir(files)
    words = shlex.split(command)[1:]
    if words[0] == "tradeoff":
        build_parser().parse_args(words)
    elif words[0] != "inspect" or main(["convert", "old.safetensors", words[1], "--force"]) == 0:
        assert main(words) == 0


def outputs() -> list[tuple[str, str]]:
    """Return the commands whose output the docs quote, with that output."""
    return [
        (block.text.splitlines()[-1].removeprefix("$ "), block.output)
        for path in PAGES
        for block in blocks(path)
        if block.language == "console" and block.output is not None
    ]


@pytest.mark.parametrize(("command", "output"), outputs())
def test_output_of_a_command(
    command: str, output: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(shlex.split(command)[1:]) == 0
    assert output in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_shell_can_parse_the_commands_of_a_page(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            done = subprocess.run(
                ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


PROGRAM = r"-m benchmarks\.[\w.]+|\w+/\w+\.py"


class Parsed(BaseException):
    """The arguments of a program are fine, and it has not run."""


def programs() -> list[tuple[str, str]]:
    """Return ``(program, arguments)`` of benchmarks and tools, as docs have them or ``make`` runs.

    ``program`` is what follows ``python``, such as ``-m benchmarks.quant``.
    """
    recipes = re.findall(
        rf"^([\w-]+):.*\n\t\$\(PY(?:THON)?\) ({PROGRAM})(.*)\$\(ARGS\)",
        (ROOT / "Makefile").read_text(encoding="utf-8"),
        re.M,
    )
    by_target = {target: (program, given) for target, program, given in recipes}
    found = set()
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        inline = re.findall(r"`((?:make|python)\s[^`]+)`", path.read_text(encoding="utf-8"))
        for line in [*commands(path), *map(" ".join, map(str.split, inline))]:
            for command in line.split(" && "):
                words = shlex.split(command)
                arguments = [word[5:] for word in words if word.startswith("ARGS=")]
                if words[0] == "make" and arguments:
                    own = [by_target[word] for word in words if word in by_target]
                    found.update((name, f"{given} {arguments[0]}".strip()) for name, given in own)
                elif match := re.search(rf"python ({PROGRAM}) ?(.*)", command):
                    found.add((match[1], match[2]))
    return sorted(pair for pair in found if "NAME" not in pair[0])


@pytest.mark.parametrize(("program", "arguments"), programs())
def test_arguments_of_benchmarks_and_tools(
    program: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parser takes them; one without a parser takes none."""
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(parser: Any, *given: Any, **named: Any) -> Any:
        left = parse(parser, *given, **named)[1]
        assert not left
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(arguments)])
    name = program.removeprefix("-m ")
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/"))
    if path.is_dir():
        path /= "__main__.py"
    if "ArgumentParser" not in path.with_suffix(".py").read_text(encoding="utf-8"):
        assert not arguments
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    run: Any = runpy.run_module
    if name.endswith(".py"):
        monkeypatch.syspath_prepend(str(path.parent))
        run = runpy.run_path
    with pytest.raises(Parsed):
        run(name, run_name="__main__")


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
    found = set(re.findall(r"^(?:::: |\| `)came8bit[\w.]*\.(\w+)\b", text, re.M))
    assert set(came8bit.__all__) <= found
