"""The code blocks of the documentation; as a script, it runs the Python of one page."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PRELUDE = DOCS / "first_optimizer.md"


@dataclass
class Block:
    """A fenced block and the block of text behind it, if that follows at once."""

    language: str
    line: int
    text: str
    output: str | None = None


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    last: Block | None = None
    end = 0
    for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        block = Block(found[1], text.count("\n", 0, found.start()) + 1, found[2])
        if block.language == "text" and last is not None and not text[end : found.start()].strip():
            last.output = block.text
        if last is not None:
            yield last
            last = None
        if block.language != "text":
            last = block
        end = found.end()
    if last is not None:
        yield last


def run_page(path: Path) -> None:
    """Run the Python of one page in this process and compare what it prints."""
    names: dict[str, object] = {"__name__": "__main__"}
    exec(next(blocks(PRELUDE)).text, names)
    for block in blocks(path):
        if block.language == "python":
            printed = io.StringIO()
            lines = "\n" * block.line + block.text
            with contextlib.redirect_stdout(printed):
                exec(compile(lines, str(path), "exec"), names)
            if block.output is not None:
                said = printed.getvalue()
                assert said.endswith(block.output), f"{path}:{block.line} printed:\n{said}"


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
