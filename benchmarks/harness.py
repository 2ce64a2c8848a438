"""What the benchmarks share: percentiles, turns, state that is counted, rows appended to a CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from came8bit import environment
from came8bit.atomic_file import atomic_file

if sys.platform != "win32":
    import fcntl

Params = list[torch.nn.Parameter]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    found = np.percentile(values, (20, 50, 80))
    return dict(zip(("p20", "p50", "p80"), map(float, found), strict=True))


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return one ratio for each repetition."""
    return [a / b for a, b in zip(times, base, strict=True)]


def turns(
    names: Sequence[str], seconds: float, fewest: int = 5, most: int = 100
) -> Iterator[list[str]]:
    """Yield the names in the order of each repetition; each begins as often as any other."""
    begin, repetition = time.monotonic(), 0
    while repetition < fewest or (time.monotonic() - begin < seconds and repetition < most):
        first = repetition % len(names)
        yield [*names[first:], *names[:first]]
        repetition += 1


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that a tensor is made of: itself, or those inside a quantized one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
    else:
        for name in flatten()[0]:
            yield from _plain(getattr(tensor, name))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the state; a storage that several share counts once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain(value) if isinstance(value, torch.Tensor) else ():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an argument that is a list of names with commas between them."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            expected = ", ".join(known)
            raise argparse.ArgumentTypeError(
                f"got {', '.join(unknown)}, expected some of {expected}"
            )
        return text.split(",")

    return parse


def moment() -> dict[str, str]:
    """Return the date and the commit, the first columns of every row."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": environment.git_revision() or os.environ.get("CAME8BIT_GIT", ""),
    }


def load() -> str:
    """Return how busy the machine is: the mean number of runnable threads of the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def write_json(content: object, path: Path) -> None:
    """Write a file of which there is always a whole one, whenever the program is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def append(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Append to the CSV, one program at a time; a file with other columns is left alone."""
    lines = list(rows)
    if not lines:
        return
    names = list(lines[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        old = file.read().decode().splitlines(keepends=True)
        if old and old[0].rstrip() != ",".join(names):
            raise SystemExit(
                f"{path} has other columns than this version writes; move it away first"
            )
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        if not old:
            writer.writeheader()
        elif not old[-1].endswith("\n"):
            text.write("\n")  # a program was stopped in the middle of its row
        writer.writerows(lines)
        file.write(text.getvalue().encode())
