"""The command line as a whole, and ``came8bit info``."""

import json
import os
import subprocess
import sys

import pytest
import torch
from processes import run_python

import came8bit
from came8bit.cli import main
from came8bit.errors import printable


def test_info_names_versions_kernels_and_peers(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(None, 1) for line in text.splitlines() if not line.startswith(" "))
    assert rows["came8bit"].startswith(came8bit.__version__)
    assert rows["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["torch"].startswith(str(torch.__version__))
    for name in ("came-pytorch", "bitsandbytes", "accelerate", "transformers"):
        assert rows[name]
    status = came8bit.kernel_status().cpu
    assert " ".join(rows["CPU"].split()) == (
        f"kernels loaded, {status.isa}" if status.loaded else f"kernels NOT loaded: {status.reason}"
    )


def test_info_as_json_has_the_same_facts(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["kernels"]["cpu"]["loaded"] == came8bit.kernel_status().cpu.loaded
    assert facts["hardware"]["cores"] >= 1
    assert facts["hardware"]["memory"] > 2**28


def test_info_says_why_kernels_are_not_loaded():
    done = run_python(
        "-m", "came8bit", "info", CAME8BIT_DISABLE_KERNELS="1", CAME8BIT_REQUIRE_KERNELS="0"
    )
    assert done.returncode == 0, done.stderr
    assert "NOT loaded: CAME8BIT_DISABLE_KERNELS is set" in done.stdout


def test_info_says_what_is_not_installed(capsys, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(x for x in lines if x.startswith("bitsandbytes")).endswith("not installed")


def test_no_command_is_an_error_that_lists_the_commands(capsys):
    assert main([]) == 2
    assert "inspect   what is in a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_name_that_no_file_can_have(capsys, command):
    assert main([command, "a\0b", *(["out"] if command == "convert" else [])]) == 2
    assert "error: embedded null byte" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "estimate", "convert"])
def test_a_file_that_is_not_there_is_named_without_a_number(capsys, command):
    words = [command, "nofile.json", *(["out"] if command == "convert" else [])]
    assert main(words) == 2
    said = f"came8bit {command}: error: nofile.json: No such file or directory\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["tradeoff", "--preset", "quik"], ["estimate", "--batch=x"]])
def test_usage_does_not_bury_the_error(capsys, words):
    with pytest.raises(SystemExit):
        main(words)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"came8bit {came8bit.__version__}"


def test_help_lists_presets_and_optimizers(capsys):
    with pytest.raises(SystemExit):
        main(["tradeoff", "--help"])
    text = "".join(capsys.readouterr().out.split())  # names may be broken at a hyphen
    for word in ("quick", "standard", "gpu", "adamw8bit", "came-pytorch", "--tune"):
        assert word in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["estimate", "llama-7b"], ["info"], ["--version"]])
def test_a_reader_who_goes_away_is_no_error(arguments, unbuffered):
    """As in ``came8bit estimate llama-7b | head -1``."""
    running = subprocess.Popen(
        [sys.executable, "-m", "came8bit", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.stdout.close()
    with running.stderr as file:
        assert file.read() == ""
    # argparse, which prints the version, overlooks the error where nothing is buffered.
    overlooked = {0} if unbuffered and arguments == ["--version"] else set()
    assert running.wait(120) in {141} | overlooked


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 1, "came8bit: error: cannot write: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written(redirection, code, said, unbuffered):
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m came8bit info {redirection}'],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("evil\x1b[2J", "evil\\x1b[2J"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\u202etxet \udc80", "\\u202etxet \\udc80"),
        ("größe 模型 / a-b_c.d", "größe 模型 / a-b_c.d"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("command", ["", "info", "estimate", "inspect", "convert", "tradeoff"])
def test_help_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*filter(None, [command]), "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_errors_of_arguments_escape_them(capsys):
    with pytest.raises(SystemExit):
        main(["info", "\x1b[2J"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: \\x1b[2J\n")


def test_errors_escape_what_came_from_outside(capsys):
    assert main(["estimate", "missing\x1b[2J\nfile.json"]) == 2
    assert "missing\\x1b[2J\\nfile.json" in capsys.readouterr().err
