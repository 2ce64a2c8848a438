"""What a run becomes: rows of a CSV, readable lines, and whether targets hold."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import came8bit
from benchmarks.harness import append, load, moment, quantiles, ratios, write_json
from benchmarks.memory_cap.job import Job
from benchmarks.memory_cap.model import SHAPES, build, loss_of
from benchmarks.memory_cap.optimizers import NONE, PLANNED, Choice
from came8bit import environment, planner
from came8bit.planner.workloads import positions_are_unpacked

ALL_OF_THEM = ("peak_allocated", "peak_reserved", "beside", "peak_address_space", "peak_resident")
"""Columns that a comparison leaves empty."""


def name_of(choice: Choice) -> str:
    """Human-readable text."""
    if choice.name == NONE:
        return "no optimizer"
    return f"{choice.name}, {'in backward' if choice.released else 'ordinary step'}"


def about(device: str, text: dict[str, Any]) -> dict[str, Any]:
    """Columns that are the same for all rows of a run."""
    versions, hardware = environment.versions(), environment.hardware()
    kernels = came8bit.kernel_status()
    kernel = kernels.cuda if device == "cuda" else kernels.cpu
    name = hardware["gpus"][0]["name"] if device == "cuda" else hardware["cpu"]
    return {
        **moment(),
        **{
            package: versions[package] or ""
            for package in ("came8bit", "torch", "transformers", "bitsandbytes", "python")
        },
        "device": name,
        "cores": hardware["cores"],
        "threads": 1 if device == "cpu" else torch.get_num_threads(),
        "kernels": kernel.isa or f"none: {kernel.reason}",
        "load": load(),
        "text": text["source"],
        "text_sha256": text["sha256"][:16],
    }


def planned_peak(job: Job, choice: Choice) -> int | None:
    """Bytes that ``came8bit.planner`` expects at the highest point."""
    if choice.name == NONE or (choice.name == "PagedAdamW8bit" and job.device == "cpu"):
        return None  # on a CPU bitsandbytes does not page, so what is planned is something else
    model = planner.from_config(SHAPES[job.shape], job.shape, "")
    setup = planner.Setup(
        batch=job.batch,
        sequence=job.sequence,
        checkpointing=True,
        release=choice.released,
        budget=choice.page_budget,
    )
    kind = planner.OPTIMIZERS[PLANNED[choice.name]]
    return planner.estimate(model, kind, setup, traced(job)).peak


def traced(job: Job) -> planner.Trace:
    """Trace the job's own forward and backward, with its logits in pieces, on fake tensors."""
    with FakeTensorMode(), positions_are_unpacked():
        model = build(job.shape, torch.device("cpu"), job.seed)
        tokens = torch.ones(job.batch, job.sequence + 1, dtype=torch.int64)
        return planner.trace(model, lambda: loss_of(model, tokens, job.piece), [tokens])


def row(
    part: str,
    job: Job,
    choice: Choice,
    result: dict[str, Any],
    cap: tuple[str, int | None] = ("", None),
    times: list[float] | None = None,
    relative: list[float] | None = None,
) -> dict[str, Any]:
    """One line of the CSV. Times in ms, memory in bytes.

    Args:
        part: what it was run for.
        job, choice: what ran.
        result: of ``job.run``.
        cap: what limits it, and bytes.
        times: seconds of timed steps; None: those of ``result`` after the warm-up.
        relative: ratios of times to those of the first way in the same run.
    """
    if times is None:
        times = result.get("seconds", [])[job.warm_up :]
    tokens = job.batch * job.sequence
    ms = {f"{q}_ms": f"{1e3 * t:.4g}" for q, t in quantiles(times).items()} if times else {}
    rates = quantiles([tokens / t for t in times]) if times else {}
    ratio = quantiles(relative) if relative else {}
    quantities = ("p20", "p50", "p80")
    compared = len(job.choices) > 1  # in one process: its peaks cannot be attributed
    peaks = [*ALL_OF_THEM, "context", "managed", "pages", "moved", "staging"]
    return {
        "part": part,
        "shape": job.shape,
        "numel": result.get("numel", ""),
        "param_bytes": result.get("param_bytes", ""),
        "batch": job.batch,
        "sequence": job.sequence,
        "optimizer": choice.name,
        "step": "in backward" if choice.released else "ordinary",
        "page_budget": "" if choice.page_budget is None else choice.page_budget,
        "cap": cap[0],
        "cap_bytes": "" if cap[1] is None else cap[1],
        "outcome": result["outcome"],
        "repeats": len(times),
        **{f"{q}_ms": ms.get(f"{q}_ms", "") for q in quantities},
        **{f"tokens_per_s_{q}": f"{rates[q]:.5g}" if rates else "" for q in quantities},
        **{f"ratio_{q}": f"{ratio[q]:.4f}" if ratio else "" for q in quantities},
        **{
            key: f"{result[key]:.6f}" if key in result else ""
            for key in ("loss_before", "loss_after")
        },
        **{key: "" if compared and key in ALL_OF_THEM else result.get(key, "") for key in peaks},
        "planned_peak": "" if compared else planned_peak(job, choice) or "",
        "message": " ".join(str(result.get("message", "")).split())[:200],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row in human-readable form."""
    what = f"{row['part']:<8}{row['shape']:<12}{row['optimizer']:<15}{row['step']:<12}"
    cap = f"{row['cap_bytes'] / 1e6:9.1f} MB {row['cap']}" if row["cap_bytes"] else " no limit"
    peak = row["peak_reserved"] or row["peak_address_space"]
    used = f", peak {peak / 1e6:.1f} MB" if peak else ""
    speed = ""
    if row["repeats"]:
        rates = [row[f"tokens_per_s_{q}"] for q in ("p20", "p50", "p80")]
        speed = f", {rates[0]} / {rates[1]} / {rates[2]} tokens/s"
    if row["ratio_p50"]:
        speed += f", {row['ratio_p50']} x ({row['ratio_p20']} to {row['ratio_p80']})"
    loss = f", loss {row['loss_before']} -> {row['loss_after']}" if row["loss_after"] else ""
    return f"{what}{cap}: {row['outcome']}{used}{speed}{loss}"


def losses(result: dict[str, Any]) -> str:
    """Return the losses on text that is not trained on."""
    return f"{result['loss_before']:.3f} -> {result['loss_after']:.3f} on text not trained on"


@dataclass
class Findings:
    """What a run has found so far, kept in its files after every row and judgement.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        csv, json: files to append to and to write, or None.
        text: what the text is.
        extra: what else the JSON file says.
        failures: pieces that did not come to their end.
    """

    device: str
    csv: Path | None = None
    json: Path | None = None
    text: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    failures: int = 0

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._about: dict[str, Any] = {}

    def add(self, new: dict[str, Any]) -> None:
        """Keep and print a row."""
        self.rows.append(new)
        print(line(new), flush=True)
        if self.csv or self.json:
            self._about = self._about or about(self.device, self.text)
        if self.csv:
            append([{**self._about, **new}], self.csv)
        self._write()

    def judge(self, what: str, holds: bool, got: str, kind: str = "target") -> None:
        """Keep and print whether a target holds."""
        text = f"{'holds ' if holds else 'MISSED'} {kind}: {what}: {got}"
        self.targets.append({"what": what, "kind": kind, "holds": holds, "got": got, "text": text})
        print(text, flush=True)
        self._write()

    def skip(self, what: str, why: str) -> None:
        """Note something that was not measured."""
        print(f"not run: {what}: {why.splitlines()[0]}", flush=True)
        self.not_run.append({"what": what, "why": why})
        self._write()

    def compared(self, job: Job, result: dict[str, Any]) -> None:
        """Add a row for each of the ways that took turns."""
        found = zip(job.choices, result["times"], result["turns"], result["paging"], strict=True)
        for choice, own, turns, pages in found:
            relative = ratios(turns, result["turns"][0])
            shown = {**result, **pages}
            self.add(row("compare", job, choice, shown, times=own, relative=relative))

    def resumed(self, shape: str, whole: dict[str, Any], rest: dict[str, Any]) -> None:
        """Judge whether a resumed run gives the losses and the parameters of the whole one."""
        what = f"{shape}: resumed in another process, losses and parameters are the same to the bit"
        if whole["outcome"] != "ok" or rest["outcome"] != "ok":
            self.judge(what, False, f"{whole['outcome']}, then {rest['outcome']}")
            return
        tail = whole["losses"][-len(rest["losses"]) :]
        same = tail == rest["losses"] and whole.get("digest") == rest.get("digest")
        same = same and whole["loss_after"] == rest["loss_after"]
        difference = max(abs(a - b) for a, b in zip(tail, rest["losses"], strict=True))
        self.judge(what, same, f"{len(tail)} steps, losses differ by up to {difference:g}")

    def _write(self) -> None:
        if self.json:
            content = {"rows": [{**self._about, **one} for one in self.rows], **self.extra}
            content |= {name: getattr(self, name) for name in ("targets", "not_run", "failures")}
            seconds = round(time.monotonic() - self._begin, 1)
            write_json({**content, "text": self.text, "seconds": seconds}, self.json)
