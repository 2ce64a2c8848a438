"""One training run on accelerate's loop, in this process or in one of its own.

A process of its own has a peak memory of its own. Such processes are forked from a small server
that has imported torch and transformers but never used them (multiprocessing's ``forkserver``), so
that a run starts in a fraction of a second. Where the system has none, each process starts from
nothing (``spawn``).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection
from typing import Any

import torch

from .config import OPTIMIZERS, RunSpec, TaskConfig
from .data import Data, eval_items, train_items
from .measure import (
    PeakMemory,
    Stopwatch,
    give_back_freed_memory,
    parameter_count,
    state_bytes,
    wide_fraction,
)
from .models import MODELS, build_model

#: Called after each optimizer step with (steps done, training loss).
Progress = Callable[[int, float], None]

_EVAL_PARTS = 32  # the evaluation set is reported in so many equal pieces, to show its own noise
_PRELOAD = [
    "came8bit.tradeoff.train",
    "accelerate",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
]


@dataclass
class RunResult:
    """What one run gave: losses in the task's unit, times in ms, sizes in bytes.

    Attributes:
        key: That of its :class:`RunSpec`.
        status: ``"ok"`` or ``"failed"``; then ``error`` says why, and the numbers stop there.
        train_losses: One per step, on the batch of that step before its update.
        evaluations: ``[step, loss]`` pairs, the last one at the end.
        loss, accuracy: At the end, on the split of the run's purpose.
        loss_parts: The loss on equal contiguous pieces of that split.
        peak_memory: Above the level before the model was built; ``memory_method`` says how it was
            taken.
        optimizer_ms: 20th, 50th, 80th percentile of ``optimizer.step()``.
        step_ms: The same for the whole step: forward, backward, clipping, update.
        seconds, cpu_seconds: Of the whole run; the latter over all threads of the process.
        git: Revision of the source tree.
    """

    purpose: str
    task: str
    optimizer: str
    seed: int
    lr: float
    key: str = ""
    status: str = "failed"
    error: str | None = None
    parameters: int = 0
    wide_fraction: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    loss: float | None = None
    accuracy: float | None = None
    loss_parts: list[float] = field(default_factory=list)
    eval_items: int = 0
    state_bytes: int | None = None
    state_bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    state_python_numbers: int = 0
    peak_memory: int | None = None
    memory_method: str | None = None
    optimizer_ms: dict[str, float] = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    processes: int = 1
    device: str = ""
    git: str | None = None

    @classmethod
    def of(cls, spec: RunSpec, error: str | None = None) -> RunResult:
        """Return the result of a run that has not ended, or ended with ``error``."""
        return cls(
            spec.purpose, spec.task.name, spec.optimizer, spec.seed, spec.lr, spec.key, error=error
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunResult:
        """Return what :meth:`as_dict` was called on."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    @property
    def bytes_per_parameter(self) -> float | None:
        """Bytes of optimizer state per trainable parameter."""
        return None if self.state_bytes is None else self.state_bytes / self.parameters

    @property
    def diverged(self) -> bool:
        """Whether it failed because its loss became infinite or NaN."""
        return (self.error or "").startswith(DivergedError.__name__)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return asdict(self) | {"bytes_per_parameter": self.bytes_per_parameter}


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


def schedule(task: TaskConfig, step: int) -> float:
    """Return the factor on the peak learning rate at ``step`` (from 0).

    Linear warm-up that reaches 1 at step ``warmup_steps``, then a cosine from 1 to ``floor``, or
    constant.
    """
    if step < task.warmup_steps:
        return (step + 1) / (task.warmup_steps + 1)
    if task.schedule == "constant":
        return 1.0
    done = (step - task.warmup_steps) / max(1, task.steps - task.warmup_steps)
    return task.floor + (1 - task.floor) / 2 * (1 + math.cos(math.pi * done))


def train(spec: RunSpec, data: Data, progress: Progress) -> RunResult:
    """Train once and measure.

    Args:
        spec: What to run.
        data: Loaded data of the task's kind.
        progress: Called on the main process after each step.

    Raises:
        DivergedError: If a loss becomes NaN or infinite.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    # bitsandbytes warns through its logger about optional packages that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    task, losses_of = spec.task, MODELS[spec.task.model].losses
    started, cpu_started = time.perf_counter(), time.process_time()
    result = RunResult.of(spec)
    accelerator = Accelerator(
        mixed_precision=spec.mixed_precision,
        cpu=spec.cpu,
        gradient_accumulation_steps=task.accumulate,
        # A batch is shared out among the processes, so their number does not change the run.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    result.device, result.processes = accelerator.device.type, accelerator.num_processes
    split = "tune" if spec.purpose == "tune" else "validation"
    # The items are in their order already, so nothing is shuffled here. No worker processes: their
    # memory would not be counted.
    batches, held_out = (
        torch.utils.data.DataLoader(items, batch_size=task.batch_size, shuffle=False)
        for items in (train_items(data, task, spec.seed), eval_items(data, task, split))
    )
    # The code of a package that is imported first here would count as the optimizer's memory.
    OPTIMIZERS[spec.optimizer].load()
    memory = PeakMemory(accelerator.device)
    result.memory_method = memory.method

    set_seed(spec.seed)
    model = build_model(task, getattr(data, "weights", None))
    result.parameters, result.wide_fraction = parameter_count(model), wide_fraction(model)
    model.to(accelerator.device)
    plain = OPTIMIZERS[spec.optimizer].build(model, spec.lr, task.weight_decay)
    model, optimizer, batches, held_out = accelerator.prepare(model, plain, batches, held_out)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: schedule(task, step))

    step_time, optimizer_time = Stopwatch(accelerator.device), Stopwatch(accelerator.device)
    source = iter(batches)
    model.train()
    for step in range(1, task.steps + 1):
        with step_time.measure():
            losses = []
            for _ in range(task.accumulate):
                inputs, targets = next(source)
                with accelerator.accumulate(model):
                    loss = losses_of(model, inputs, targets)[0].mean()
                    accelerator.backward(loss)
                    losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        if task.max_grad_norm > 0:
                            accelerator.clip_grad_norm_(model.parameters(), task.max_grad_norm)
                        with optimizer_time.measure():
                            optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
        train_loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
        if not math.isfinite(train_loss):
            raise DivergedError(f"the training loss is {train_loss} at step {step}, lr {spec.lr:g}")
        result.train_losses.append(round(train_loss, 5))
        if accelerator.is_main_process:
            progress(step, train_loss)
        if task.eval_every and step % task.eval_every == 0 and step < task.steps:
            item_losses, _ = _evaluate(accelerator, model, held_out, losses_of)
            result.evaluations.append((step, float(item_losses.mean())))

    item_losses, result.accuracy = _evaluate(accelerator, model, held_out, losses_of)
    result.loss = float(item_losses.mean())
    if not math.isfinite(result.loss):
        raise DivergedError(f"the loss after training is {result.loss}, lr {spec.lr:g}")
    result.evaluations.append((task.steps, result.loss))
    result.eval_items = len(item_losses)
    parts = min(_EVAL_PARTS, len(item_losses))
    result.loss_parts = [round(float(p.mean()), 5) for p in item_losses.tensor_split(parts)]
    counted = state_bytes(plain)
    result.state_bytes, result.state_bytes_by_dtype = counted.total, counted.by_dtype
    result.state_python_numbers = counted.python_numbers
    result.peak_memory = memory.above_start()
    result.optimizer_ms, result.step_ms = optimizer_time.summary(), step_time.summary()
    result.seconds = time.perf_counter() - started
    result.cpu_seconds = time.process_time() - cpu_started
    result.status = "ok"
    accelerator.free_memory()
    return result


@torch.no_grad()
def _evaluate(
    accelerator: Any, model: torch.nn.Module, held_out: Any, losses_of: Any
) -> tuple[torch.Tensor, float | None]:
    """Return each held-out item's loss (float64, on the CPU) and the share of right answers."""
    model.eval()
    losses, hits = [], []
    for inputs, targets in held_out:
        item_losses, right = losses_of(model, inputs, targets)
        losses.append(accelerator.gather_for_metrics(item_losses).double().cpu())
        if right is not None:
            hits.append(accelerator.gather_for_metrics(right).double().cpu())
    model.train()
    return torch.cat(losses), float(torch.cat(hits).mean()) if hits else None


# ---- processes ----


def run_here(spec: RunSpec, data: Data, progress: Progress) -> RunResult:
    """Run in this process. An exception becomes a failed result; KeyboardInterrupt does not."""
    try:
        return train(spec, data, progress)
    except Exception as error:  # whatever an optimizer raises is that optimizer's result
        return RunResult.of(spec, _describe(error))


def run_isolated(spec: RunSpec, data: Data, progress: Progress) -> RunResult:
    """Run in a new process. If that dies, or this one is interrupted, no process is left behind."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, spec), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.send(data)
        while True:
            kind, content = ours.recv()
            if kind == "done":
                result: RunResult = content
                return result
            progress(*content)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        process.join(10)
        ended = _exit(process.exitcode)
        return RunResult.of(spec, f"its process ended without a result ({ended})")
    finally:
        ours.close()
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def distributed() -> bool:
    """Return whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def from_main_process(value: Any, cpu: bool) -> Any:
    """Return the main process's ``value`` in all processes that a launcher started."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=cpu)
    box = [value]
    broadcast_object_list(box)
    return box[0]


def _child(connection: Connection, spec: RunSpec) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    data = connection.recv()
    if spec.purpose == "memory":
        give_back_freed_memory()
        # Once for nothing: pages of code that are read in at first use are not memory of training.
        run_here(spec, data, lambda step, loss: None)
        gc.collect()

    def report(step: int, loss: float) -> None:
        connection.send(("progress", (step, loss)))

    # If the parent has gone, nothing is left to be told.
    with contextlib.suppress(BrokenPipeError):
        connection.send(("done", run_here(spec, data, report)))


def _describe(error: BaseException) -> str:
    """Return the error's type, message and the last place in the code it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    where = (
        f" (in {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    )
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}; too little memory?"
    return f"exit code {code}"
