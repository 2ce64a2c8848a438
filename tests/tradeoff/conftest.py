"""Runs small studies."""

from pathlib import Path

import pytest
import torch
from small_study import SMALL

from came8bit.cli import main


@pytest.fixture
def text_file(tmp_path):
    """Some 90 kB of real text."""
    source = Path(torch.nn.functional.__file__)
    path = tmp_path / "text.txt"
    path.write_bytes(source.read_bytes()[:90_000])
    return path


@pytest.fixture
def small(text_file, tmp_path):
    """Runs a small study in this process: arguments → (exit code, folder)."""

    def run(*arguments, out="out"):
        folder = tmp_path / out
        words = [
            "tradeoff",
            "--text",
            str(text_file),
            "--out",
            str(folder),
            "--in-process",
            "--cpu",
        ]
        return main([*words, *SMALL, *arguments]), folder

    return run
