"""One training run, or a comparison of several ways of stepping, inside one process."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import came8bit
from benchmarks.memory_cap.memory import (
    CpuMeter,
    CudaMeter,
    Refused,
    copy_speeds,
    meter_for,
    shortage,
)
from benchmarks.memory_cap.model import Batches, build, loss_of
from benchmarks.memory_cap.optimizers import (
    NONE,
    OURS,
    Choice,
    Stepping,
    managed_bytes,
    paged_bytes,
)
from came8bit.tradeoff.data import Text

DIGEST_LIMIT = 1 << 30  # bytes of parameters up to which they are hashed at the end


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        shape: of ``model.SHAPES``.
        choices: one way of stepping; several take turns and are only timed.
        device: ``"cpu"`` or ``"cuda"``.
        batch, sequence: of a step.
        piece: tokens whose logits exist at once.
        steps: to train, counted from the very beginning; of a comparison: of a turn.
        warm_up: steps that are not timed; of a comparison: of each turn.
        turns: of a comparison: of each way.
        seed: of weights and batches.
        cap: bytes of the GPU; None: all it has.
        folder: where to save and to load.
        save_after: save when this many steps are done, and go on.
        resume: begin with what is saved there.
        repeatable: ask PyTorch for deterministic kernels.
    """

    shape: str
    choices: tuple[Choice, ...]
    device: str = "cpu"
    batch: int = 1
    sequence: int = 64
    piece: int = 1 << 30
    steps: int = 4
    warm_up: int = 2
    turns: int = 3
    seed: int = 0
    cap: int | None = None
    folder: str | None = None
    save_after: int | None = None
    resume: bool = False
    repeatable: bool = False

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Job:
        """Undo :func:`dataclasses.asdict`, after a round trip through JSON."""
        choices = tuple(Choice(**choice) for choice in content["choices"])
        return cls(**{**content, "choices": choices})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(job: Job, text: Text) -> dict[str, Any]:
    """Run ``job``.

    Returns:
        ``outcome`` is ``"ok"``, or ``"out of memory"`` or ``"refused"`` with a ``message``; then
        what has been found out: bytes, seconds, losses.

    Raises:
        Exception: whatever goes wrong but for want of memory.
    """
    device = torch.device(job.device)
    if job.repeatable:
        _be_repeatable()
    meter = meter_for(device, job.cap)
    found: dict[str, Any] = {"outcome": "ok"}
    try:
        meter.begin()
        if len(job.choices) > 1:
            _compare(job, text, meter, found)
        else:
            _train(job, text, meter, found)
    except Refused as error:
        found.update(outcome="refused", message=str(error))
        return found
    except Exception as error:
        message = shortage(error)
        if message is None:
            raise
        found.update(outcome="out of memory", message=message)
    # The model and all that belongs to it have gone with their frames.
    found.update(meter.end())
    return found


def _be_repeatable() -> None:
    """Make a GPU return the same bits each time: its fast attention kernels add in any order.

    What cannot be had is a warning: two runs are compared in any case.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    for fast in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fast}_sdp")(False)


def _describe(model: torch.nn.Module, found: dict[str, Any]) -> None:
    params = list(model.parameters())
    found["numel"] = sum(param.numel() for param in params)
    found["param_bytes"] = sum(param.nbytes for param in params)
    found["largest_grad_bytes"] = max(param.nbytes for param in params)


def _train(job: Job, text: Text, meter: CpuMeter | CudaMeter, found: dict[str, Any]) -> None:
    device = torch.device(job.device)
    begin = time.perf_counter()
    # What is resumed begins with other weights, so that it shows if they are not replaced.
    model = build(job.shape, device, job.seed + job.resume)
    _describe(model, found)
    (choice,) = job.choices
    _refuse_oversubscription(job, found)
    stepping = Stepping(choice, model)
    first = _load(job, model, stepping) if job.resume else 0
    batches = Batches(text, job.batch, job.sequence, job.seed)
    held_out = batches.held_out().to(device)
    with torch.no_grad():
        found["loss_before"] = float(loss_of(model, held_out, job.piece))
    found["setup_seconds"] = time.perf_counter() - begin
    losses: list[Tensor] = []
    for step in range(first, job.steps):
        meter.start()
        losses.append(_step(job, model, stepping, batches, step))
        meter.stop()
        if step + 1 == job.save_after:
            found["saved_bytes"] = _save(job, model, stepping, step + 1)
    found["seconds"] = meter.seconds()
    found["losses"] = [float(loss) for loss in losses]
    with torch.no_grad():
        found["loss_after"] = float(loss_of(model, held_out, job.piece))
    if choice.name in OURS:
        found.update(paged_bytes(stepping.optimizer))
    if choice.name == "PagedAdamW8bit":
        found["managed"] = managed_bytes()
    if found["param_bytes"] <= DIGEST_LIMIT:
        found["digest"] = _digest(model)


def _step(
    job: Job, model: torch.nn.Module, stepping: Stepping, batches: Batches, step: int
) -> Tensor:
    loss = loss_of(model, batches(step).to(job.device), job.piece)
    loss.backward()
    stepping.after_backward()
    return loss.detach()


def _compare(job: Job, text: Text, meter: CpuMeter | CudaMeter, found: dict[str, Any]) -> None:
    """Let several optimizers take turns on one model; each owns its state."""
    if torch.device(job.device).type == "cuda":
        found["copy"] = copy_speeds()
    model = build(job.shape, torch.device(job.device), job.seed)
    _describe(model, found)
    batches = Batches(text, job.batch, job.sequence, job.seed)
    made: list[Stepping] = []
    turns: list[list[float]] = [[] for _ in job.choices]  # medians
    times: list[list[float]] = [[] for _ in job.choices]
    step = done = 0
    for turn in range(job.turns):
        for shift in range(len(job.choices)):
            # In the first turn they come in order, later each begins once in a while.
            index = (turn + shift) % len(job.choices)
            if turn == 0:
                made.append(Stepping(job.choices[index], model))
            else:
                made[index].attach()
            for _ in range(job.warm_up + job.steps):
                meter.start()
                _step(job, model, made[index], batches, step)
                meter.stop()
                step += 1
            made[index].detach()
            new = meter.seconds()[done + job.warm_up :]
            done = len(meter.seconds())
            times[index] += new
            turns[index].append(statistics.median(new))
    found["times"], found["turns"] = times, turns
    found["paging"] = [
        paged_bytes(stepping.optimizer) if stepping.choice.name in OURS else {} for stepping in made
    ]


def _refuse_oversubscription(job: Job, found: dict[str, Any]) -> None:
    """Refuse managed memory larger than what the GPU has left: it can hang the GPU."""
    (choice,) = job.choices
    if choice.name != "PagedAdamW8bit" or job.device != "cuda":
        return
    free, _ = torch.cuda.mem_get_info()
    gradients = found["largest_grad_bytes"] if choice.released else found["param_bytes"]
    wanted = 2.1 * found["numel"] + gradients + (4 << 30)  # 4 GiB for activations and the rest
    if wanted > free:
        raise Refused(
            f"PagedAdamW8bit would have {2 * found['numel']:.3g} bytes of managed memory on a GPU "
            f"with {free:.3g} free, of which gradients and activations need a part; it is not run "
            "where managed memory could be oversubscribed"
        )


# --- saving, and what tells whether two runs are the same -----------------------------------------


def _save(job: Job, model: torch.nn.Module, stepping: Stepping, step: int) -> int:
    """Write model and optimizer; a file for each tensor, so no second copy of the model is made."""
    from safetensors.torch import save_file

    folder = Path(job.folder or ".")
    for number, (name, param) in enumerate(model.named_parameters()):
        save_file({name: param.detach()}, folder / f"model-{number:04}.safetensors")
    came8bit.save_checkpoint(
        stepping.optimizer,  # type: ignore[arg-type]
        folder / "optimizer.safetensors",
        metadata={"step": str(step)},
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _load(job: Job, model: torch.nn.Module, stepping: Stepping) -> int:
    """Read what :func:`_save` wrote; the number of steps done."""
    from safetensors.torch import load_file

    folder = Path(job.folder or ".")
    with torch.no_grad():
        for number, (name, param) in enumerate(model.named_parameters()):
            param.copy_(load_file(folder / f"model-{number:04}.safetensors")[name])
    optimizer: Any = stepping.optimizer
    report = came8bit.load_checkpoint(optimizer, folder / "optimizer.safetensors")
    return int(report.metadata["step"])


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def warm_up(text: Text) -> None:
    """Load everything that is loaded on first use: a few steps of a tiny model on the CPU."""
    run(Job("llama-7b/16", (Choice(NONE, True),), sequence=8, steps=1), text)
    with tempfile.TemporaryDirectory() as folder:
        for choice in (Choice("CAME8bit", False), Choice("PagedCAME8bit", True)):
            job = Job("llama-7b/16", (choice,), sequence=8, steps=2, folder=folder, save_after=1)
            run(job, text)
            run(replace(job, resume=True), text)
