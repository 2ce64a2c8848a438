"""A run of the GPU benchmark: what it has found so far, kept in its files after every step."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import came8bit
from benchmarks.gpu_step.measure import Device, DeviceLost
from benchmarks.gpu_step.targets import judge
from benchmarks.harness import Params, append, moment, write_json
from came8bit import environment

LISTS = ("rows", "sweeps", "scans", "not_run")


@dataclass
class Case:
    """A parameter list of one dtype, shared by all optimizers."""

    name: str
    dtype: str
    params: Params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        return [tuple(p.shape) for p in self.params]


@dataclass
class Run:
    """What a run has found so far."""

    device: Device
    deadline: float
    folder: Path
    about: dict[str, Any]
    copy: dict[str, Any]
    piece: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    scans: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    failures: int = 0
    """Of what is ours."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By piece."""

    def __post_init__(self) -> None:
        self._begin = time.monotonic()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        """Note something that was not measured."""
        print(f"not run: {what}: {why}", flush=True)
        self.not_run.append({"piece": self.piece, "what": what, "why": why})

    @contextlib.contextmanager
    def guard(self, what: str, ours: bool = False) -> Iterator[None]:
        """Whatever goes wrong within is noted and over, unless the device is lost.

        Raises:
            DeviceLost: nothing more can be measured in this process.
        """
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self.failures += ours
            self.skip(what, f"{type(error).__name__}: {text}")
            self.device.check()

    def tidy(self) -> None:
        """Write what is known, and give memory back: a case is over."""
        self.write()
        gc.collect()
        self.device.empty_cache()

    # --- files ------------------------------------------------------------------------------------

    def begin(self, piece: str) -> None:
        """Replace what an earlier run has found of this piece, row by row or at once."""
        self.piece = piece
        for name in ("sweeps", "scans", "not_run"):
            items = getattr(self, name)
            items[:] = [item for item in items if item["piece"] != piece]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to the result, in place of one of the same name, and to the CSV."""
        key = key_of(row)
        self.rows[:] = [other for other in self.rows if key_of(other) != key]
        self.rows.append(row)
        common = {k: self.about[k] for k in ("date", "git", "device", "kernels")}
        common |= {"torch": self.about["versions"]["torch"], "copy": self.copy["bytes_per_second"]}
        line = {**common, **row}
        rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
        append([rounded], self.folder / "gpu.csv")

    def result(self) -> dict[str, Any]:
        """All of it, judged."""
        self.seconds[self.piece] = round(time.monotonic() - self._begin, 1)
        found = {name: getattr(self, name) for name in ("about", "copy", "seconds", *LISTS)}
        return {**found, "targets": judge(found)}

    def write(self) -> None:
        """Write gpu.json; whenever it is stopped, one that is whole is there."""
        write_json(self.result(), self.folder / "gpu.json")


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is about."""
    return row["case"], row["dtype"], row["optimizer"]


def about(device: Device) -> dict[str, Any]:
    """Return what the figures belong to."""
    status = came8bit.kernel_status().cuda
    facts: dict[str, Any] = {
        **moment(),
        "device": "cpu: plumbing only, the figures mean nothing",
        "kernels": status.isa or f"none: {status.reason}",
        "versions": environment.versions(),
    }
    for package in ("adafactor8bit", "torchao"):
        facts["versions"][package] = environment.package_version(package)
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["memory"] = properties.total_memory
        facts["l2_bytes"] = device.l2_bytes
        facts["capability"] = f"{properties.major}.{properties.minor}"
    return facts


def start(device: Device, seconds: float, folder: Path, add: bool) -> Run:
    """Start a run, or with ``add`` continue one of the same sources on the same device."""
    begin = time.monotonic()
    facts = about(device)
    run = Run(device, begin + seconds, folder, facts, device.copy_bandwidth())
    path = folder / "gpu.json"
    if not add or not path.exists():
        return run
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = ("git", "device", "kernels")
    if any(earlier["about"].get(k) != facts[k] for k in same):
        return run
    for name in ("copy", "seconds", *LISTS):  # all shares of a copy are of the same one
        setattr(run, name, earlier[name])
    return run
