"""The job on a GPU: what fits under a cap, what paging costs, how fast others are.

Pieces run in the order of their importance, each in a process of its own, until the time is up.
:class:`Plan` with ``device="cpu"`` goes through all of them with tiny shapes and without a cap: to
try the code, not to measure.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import quantiles, ratios
from benchmarks.memory_cap.job import Job
from benchmarks.memory_cap.launch import Worker, WorkerError
from benchmarks.memory_cap.optimizers import Choice
from benchmarks.memory_cap.proof import planned_state
from benchmarks.memory_cap.rows import Findings, losses, name_of, row

PAGED = Choice("PagedCAME8bit", released=True)
RESIDENT = Choice("CAME8bit", released=True)
BITSANDBYTES = Choice("PagedAdamW8bit", released=True)
CAPS = {"llama-7b": 16_000_000_000, "llama-8b": 24_000_000_000}
TINY = {"llama-7b": "llama-7b/16", "llama-8b": "llama-8b/16", "llama-7b/8": "llama-7b/16"}
NOISE = 0.01
"""Share of a step by which two equal ways may seem to differ."""
PIECE = 512  # tokens whose logits exist at once

Start = Callable[[], Worker]


@dataclass
class Plan:
    """Runs the pieces and collects what they find.

    Args:
        device: ``"cuda"``, or ``"cpu"`` to rehearse.
        start: gives a process for a job.
        seconds: for everything, about.
        steps: timed ones of each run.
    """

    device: str
    start: Start
    seconds: float
    steps: int = 12
    found: Findings = field(default_factory=lambda: Findings(""))
    copy: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    # --- what there is to run ---------------------------------------------------------------------

    def run(self) -> None:
        """Everything, the most important first; the numbers are seconds that a piece may need."""
        ordinary = [Choice(name, released=False) for name in ("PagedAdamW8bit", "AdamW")]
        self._piece(40, self.fit, "llama-7b", PAGED, 1024)
        self._piece(55, self.compare, "llama-7b", 1024)
        self._piece(40, self.fit, "llama-8b", PAGED, 2048)
        self._piece(45, self.fit, "llama-7b", BITSANDBYTES, 1024)
        self._piece(35, self.resume, "llama-7b/8", 256)
        self._piece(30, self.fail, "llama-7b", RESIDENT)
        self._piece(30, self.fail, "llama-7b", replace(PAGED, released=False))
        self._piece(55, self.compare, "llama-7b", 4096)
        self._piece(40, self.fit, "llama-7b", PAGED, 2048)
        for choice in ordinary:
            self._piece(30, self.fail, "llama-7b", choice)
        self._piece(50, self.fit, "llama-8b", BITSANDBYTES, 2048)

    def _piece(self, needs: float, work: Callable[..., None], *arguments: Any) -> None:
        words = [name_of(a) if isinstance(a, Choice) else str(a) for a in arguments]
        what = f"{work.__name__} {', '.join(words)}"
        left = self._deadline - time.monotonic()
        if left < needs:
            self.found.skip(what, f"out of time: {left:.0f} s left, may need {needs:.0f}")
            return
        try:
            work(*arguments)
        except (WorkerError, OSError) as error:
            self.found.failures += 1
            self.found.skip(what, f"failed: {error}")

    # --- pieces -----------------------------------------------------------------------------------

    def fit(self, shape: str, choice: Choice, sequence: int) -> None:
        """Train under the cap of ``shape``."""
        job = self._job(shape, (choice,), sequence)
        result = self._run(job)
        what = f"{shape}, {sequence} tokens, {name_of(choice)}"
        if result["outcome"] == "refused":
            self.found.skip(what, result["message"])
            return
        self.found.add(row("cap", job, choice, result, ("card", job.cap)))
        if result["outcome"] != "ok":
            self._judge(f"{what}: fits", False, result["message"], choice)
            return
        fell = result["loss_after"] < result["loss_before"]
        self._judge(f"{what}: the loss falls", fell, losses(result), choice)
        if job.cap is None:
            return
        reserved, managed = result["peak_reserved"], result.get("managed", 0)
        # Managed memory is where the driver wants it: on a large GPU, on the GPU.
        beside = result["context"] if managed else result["beside"]
        got = (
            f"{(reserved + beside) / 1e9:.2f} GB of the card of {job.cap / 1e9:.0f}, of it "
            f"{result['peak_allocated'] / 1e9:.2f} in tensors, {beside / 1e9:.2f} the driver's"
        )
        if managed:
            there = max(0, result["beside"] - result["context"])
            got += (
                f"; not counted: {managed / 1e9:.2f} GB of managed memory, which no cap holds: "
                f"{there / 1e9:.2f} GB of it, and of what the driver has loaded, are on the card, "
                "so its speed here is that of an optimizer that does not page"
            )
        self._judge(f"{what}: fits", reserved + beside <= job.cap, got, choice)
        self._beside(shape, sequence)

    def _beside(self, shape: str, sequence: int) -> None:
        """Tokens per second beside those of bitsandbytes, once both are there."""
        found = {
            r["optimizer"]: r
            for r in self.found.rows
            if (r["part"], r["shape"], r["sequence"]) == ("cap", shape, sequence)
            and r["outcome"] == "ok"
        }
        if PAGED.name in found and BITSANDBYTES.name in found:
            ours, theirs = (
                float(found[choice.name]["tokens_per_s_p50"]) for choice in (PAGED, BITSANDBYTES)
            )
            got = f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.3f}"
            if self.copy:
                moved = 1e3 * (found[BITSANDBYTES.name]["managed"] or 0) / self.copy["both"]
                got += (
                    f"; theirs did not move, which over this bus would take {moved:.0f} ms of each "
                    f"step besides {found[BITSANDBYTES.name]['p50_ms']}"
                )
            what = f"{shape}, {sequence} tokens: tokens/s of {PAGED.name} / {BITSANDBYTES.name}"
            if not any(t["what"] == what for t in self.found.targets):
                self.found.judge(what, ours >= theirs, got, "goal")

    def fail(self, shape: str, choice: Choice) -> None:
        """Without one of the savings it must not fit, or the cap proves nothing."""
        job = replace(self._job(shape, (choice,), 1024), steps=2, warm_up=0)
        result = self._run(job)
        what = f"{shape}, 1024 tokens, {name_of(choice)}: does not fit"
        if result["outcome"] == "refused":
            self.found.skip(what, result["message"])
            return
        self.found.add(row("counter", job, choice, result, ("card", job.cap)))
        if job.cap is not None:
            ran_out = result["outcome"] == "out of memory"
            self.found.judge(what, ran_out, result.get("message", "it fits"))

    def compare(self, shape: str, sequence: int) -> None:
        """Resident, paged with room for everything, and paged, in turns and without a cap."""
        everything = sum(planned_state(self._shape(shape), PAGED).pages)
        choices = (RESIDENT, replace(PAGED, page_budget=2 * everything), PAGED)
        job = self._job(shape, choices, sequence)
        job = replace(job, cap=None, steps=max(2, self.steps // 3), warm_up=2, turns=3)
        result = self._run(job)
        if result["outcome"] != "ok":
            raise WorkerError(result["message"])
        self.found.compared(job, result)
        what = f"{shape}, {sequence} tokens: "
        if self.device == "cpu":
            return
        ratio = quantiles(ratios(result["turns"][1], result["turns"][0]))["p50"]
        got = f"{100 * (ratio - 1):+.2f} % (up to {100 * NOISE:g} % is noise)"
        self.found.judge(what + "paging costs 0 % if all fits", ratio <= 1 + NOISE, got)
        self.copy = self.found.extra["copy"] = result["copy"]
        compute, paged = (statistics.median(result["times"][i]) for i in (0, 2))
        carried = result["paging"][2]["moved"] / self.copy["both"]
        over = paged / max(compute, carried) - 1
        got = (
            f"{100 * over:+.1f} %: {1e3 * paged:.1f} ms against compute {1e3 * compute:.1f} and "
            f"copies {1e3 * carried:.1f} ({result['paging'][2]['moved'] / 1e9:.2f} GB each way at "
            f"{self.copy['both'] / 1e9:.1f} GB/s); {100 * (paged / compute - 1):+.1f} % above "
            "resident"
        )
        what += "paged at most 15 % above max(compute, bytes/PCIe)"
        self.found.judge(what, over <= 0.15, got)

    def resume(self, shape: str, sequence: int) -> None:
        """Save in the middle, go on in another process: the same losses."""
        with tempfile.TemporaryDirectory() as folder:
            job = self._job(shape, (PAGED,), sequence)
            job = replace(job, cap=None, steps=6, folder=folder, repeatable=True)
            whole = self._run(replace(job, save_after=3))
            rest = self._run(replace(job, resume=True))
        for part, result in (("saved", whole), ("resumed", rest)):
            self.found.add(row(part, job, PAGED, result))
        self.found.resumed(shape, whole, rest)

    # --- how they run -----------------------------------------------------------------------------

    def _shape(self, shape: str) -> str:
        return shape if self.device == "cuda" else TINY[shape]

    def _job(self, shape: str, choices: tuple[Choice, ...], sequence: int) -> Job:
        rehearsal = self.device == "cpu"
        return Job(
            self._shape(shape),
            choices,
            self.device,
            sequence=sequence // 32 if rehearsal else sequence,
            piece=PIECE // 32 if rehearsal else PIECE,
            steps=3 + self.steps,
            warm_up=3,
            cap=None if rehearsal else CAPS.get(shape),
        )

    def _run(self, job: Job) -> dict[str, Any]:
        worker = self.start()
        try:
            self.found.text = worker.text
            left = self._deadline - time.monotonic()
            return worker.run(job, seconds=max(10.0, left))
        finally:
            if self.device == "cuda":  # a process for each job
                worker.close()

    def _judge(self, what: str, holds: bool, got: str, choice: Choice) -> None:
        """Ours are targets; what others do is told."""
        kind = "target" if choice.name == PAGED.name else "of others"
        self.found.judge(what, holds, got, kind)
