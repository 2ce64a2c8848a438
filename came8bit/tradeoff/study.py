"""The study: which runs there are, in which order, and what is kept when something stops them."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .config import OPTIMIZERS, TUNE_SEEDS, RunSpec, StudyConfig, TaskConfig, label, why_unavailable
from .data import Data
from .train import Progress, RunResult

Run = Callable[[RunSpec, Data, Progress], RunResult]


@dataclass
class Study:
    """A study and what has become of it so far.

    Attributes:
        about: Versions, hardware, data: whatever does not change during the study.
        skipped: Optimizer or task → why it is not run.
        runs: Finished runs, in order, failed ones included.
        planned: Number of runs the study has in all.
        state: ``"running"``, ``"complete"`` or ``"interrupted"``.
    """

    config: StudyConfig
    about: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    runs: list[RunResult] = field(default_factory=list)
    planned: int = 0
    state: str = "running"
    seconds: float = 0.0

    def final(self, task: str, optimizer: str | None = None) -> list[RunResult]:
        """Return the reported runs of a task (and an optimizer) that ended well."""
        return [
            run
            for run in self.runs
            if run.purpose == "final"
            and run.status == "ok"
            and run.task == task
            and optimizer in (None, run.optimizer)
        ]

    def ran(self, task: str) -> list[str]:
        """Return the optimizers with at least one reported run of the task, in order."""
        return [name for name in self.config.optimizers if self.final(task, name)]

    def failed(self) -> list[RunResult]:
        """Return the runs that failed, but for learning rates of the search that were too high."""
        return [
            run
            for run in self.runs
            if run.status != "ok"
            and not (run.purpose == "tune" and "DivergedError" in str(run.error))
        ]

    def tuned(self, task: str, optimizer: str) -> dict[float, float | None]:
        """Return the search: learning rate → mean loss over its seeds, None if a run failed."""
        by_lr: dict[float, list[float | None]] = {}
        for run in self.runs:
            if (run.purpose, run.task, run.optimizer) == ("tune", task, optimizer):
                by_lr.setdefault(run.lr, []).append(run.loss if run.status == "ok" else None)
        means: dict[float, float | None] = {}
        for lr in sorted(by_lr):
            known = [loss for loss in by_lr[lr] if loss is not None]
            means[lr] = statistics.fmean(known) if len(known) == len(by_lr[lr]) else None
        return means

    def peak_memory(self, task: str, optimizer: str) -> list[int]:
        """Return peaks in bytes: of the run made for it or, without one, of the reported runs."""
        own = [
            run.peak_memory
            for run in self.runs
            if (run.purpose, run.task, run.optimizer) == ("memory", task, optimizer)
        ]
        peaks = own or [run.peak_memory for run in self.final(task, optimizer)]
        return [peak for peak in peaks if peak is not None]


def available(config: StudyConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the optimizers that are installed here, and why each of the others is not run."""
    reasons = {name: why_unavailable(name) for name in config.optimizers}
    usable = tuple(name for name, reason in reasons.items() if reason is None)
    return usable, {name: reason for name, reason in reasons.items() if reason is not None}


def seeds_of(config: StudyConfig, optimizer: str, on_cpu: bool) -> tuple[int, ...]:
    """Return the seeds of an optimizer: fewer for one that is slow on a CPU, if it runs on one."""
    if on_cpu and OPTIMIZERS[optimizer].slow_on_cpu:
        return config.seeds[: config.slow_seeds]
    return config.seeds


def run_study(
    study: Study,
    data: dict[str, Data],
    run: Run,
    *,
    on_cpu: bool,
    isolated: bool,
    save: Callable[[Study], None],
    watch: Callable[[RunSpec, int], contextlib.AbstractContextManager[Progress]],
) -> None:
    """Run what is in ``study.config`` and can be run, adding to ``study.runs``.

    Seeds are the outer loop, so that a study that is stopped early has compared the optimizers on
    the seeds it got to. On KeyboardInterrupt what is finished is saved, ``study.state`` says so,
    and the function returns.

    Args:
        study: Receives the results.
        data: Per task kind, its data; tasks without data are left out.
        run: Does one run.
        on_cpu: Whether it runs on a CPU; the slow optimizers get fewer seeds then.
        isolated: Whether ``run`` gives each run a process of its own. On a CPU, where the reported
            runs show also what the allocator keeps, memory then gets runs of its own.
        save: Called after every run and at the end.
        watch: Given a run and the number of runs before it, shows its progress.
    """
    started = time.perf_counter()
    usable = [name for name in study.config.optimizers if name not in study.skipped]
    tasks = [task for task in study.config.tasks if task.kind in data]
    tuning = [spec for task in tasks for spec in _search(study.config, task, usable)]
    per_task = sum(len(seeds_of(study.config, name, on_cpu)) for name in usable)
    memory = list(_memory(study.config, tasks, usable)) if on_cpu and isolated else []
    study.planned = len(memory) + len(tuning) + per_task * len(tasks)

    def keep_running(specs: Iterator[RunSpec]) -> None:
        for spec in specs:
            with watch(spec, len(study.runs)) as progress:
                study.runs.append(run(spec, data[spec.task.kind], progress))
            study.seconds = time.perf_counter() - started
            save(study)

    try:
        keep_running(iter(memory))
        keep_running(iter(tuning))
        keep_running(spec for task in tasks for spec in _final(study, task, usable, on_cpu))
        study.state = "complete"
    except KeyboardInterrupt:
        study.state = "interrupted"
    study.seconds = time.perf_counter() - started
    save(study)


def _memory(config: StudyConfig, tasks: list[TaskConfig], usable: list[str]) -> Iterator[RunSpec]:
    for task in tasks:
        short = replace(task, steps=3, eval_items=task.batch_size, eval_every=0)
        for name in usable:
            # The size of the steps does not matter here; it only has to be small enough.
            lr = min(config.grids[task.kind][name])
            seed = config.seeds[0]
            yield RunSpec("memory", short, name, seed, lr, config.mixed_precision, config.cpu)


def _search(config: StudyConfig, task: TaskConfig, usable: list[str]) -> Iterator[RunSpec]:
    if not config.tune:
        return
    for name in usable:
        for lr in config.grids[task.kind][name]:
            for seed in TUNE_SEEDS:
                yield RunSpec("tune", task, name, seed, lr, config.mixed_precision, config.cpu)


def _final(study: Study, task: TaskConfig, usable: list[str], on_cpu: bool) -> Iterator[RunSpec]:
    config = study.config
    for seed in config.seeds:
        for name in usable:
            if seed in seeds_of(config, name, on_cpu):
                # Looked up here, after the search: this is a generator.
                lr = learning_rate(study, task.kind, name)
                yield RunSpec("final", task, name, seed, lr, config.mixed_precision, config.cpu)


def learning_rate(study: Study, task: str, optimizer: str) -> float:
    """Return the learning rate of the reported runs: the best of the search, or the given one.

    If every run of the search failed, the lowest of the grid: the reported run then shows why.
    """
    if not study.config.tune:
        return study.config.learning_rates[task][optimizer]
    means = {lr: loss for lr, loss in study.tuned(task, optimizer).items() if loss is not None}
    if not means:
        return min(study.config.grids[task][optimizer])
    return min(means, key=means.__getitem__)


def at_grid_edge(study: Study, task: str, optimizer: str) -> bool:
    """Return whether the search ended at the lowest or highest learning rate it tried."""
    grid = study.config.grids[task][optimizer]
    if not study.config.tune or len(grid) == 1:
        return False
    return learning_rate(study, task, optimizer) in (min(grid), max(grid))


class ProgressBars:
    """Shows a study on standard error: bars on a terminal, one line per finished run elsewhere."""

    def __init__(self, study: Study, shown: bool = True) -> None:
        self._study = study
        self._shown = shown
        self._bars = shown and sys.stderr.isatty()
        self._all: Any = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._all is not None:
            self._all.close()

    @contextmanager
    def watch(self, spec: RunSpec, done: int) -> Iterator[Progress]:
        """Show one run; gives the function to call after each step."""
        what = "" if spec.purpose == "final" else f"({spec.purpose}) "
        name = f"{what}{spec.task.kind} {label(spec.optimizer)} lr {spec.lr:g} seed {spec.seed}"
        if self._bars:
            from tqdm import tqdm

            if self._all is None:
                self._all = tqdm(total=self._study.planned, desc="runs", unit="run", position=0)
            with tqdm(
                total=spec.task.steps, desc=name, unit="step", position=1, leave=False
            ) as bar:

                def show(step: int, loss: float) -> None:
                    bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                    bar.update(step - bar.n)

                yield show
            self._all.update(1)
        else:
            yield lambda step, loss: None
        if self._shown:
            self._say(f"[{done + 1}/{self._study.planned}] {name}: {self._outcome()}")

    def _outcome(self) -> str:
        run = self._study.runs[-1]
        if run.status != "ok":
            return f"FAILED: {run.error}"
        if run.purpose == "memory" and run.peak_memory is not None:
            return f"peak memory {run.peak_memory / 2**20:.1f} MiB"
        return f"loss {run.loss:.4f}, {run.step_ms['p50']:.0f} ms a step, {run.seconds:.0f} s"

    def _say(self, line: str) -> None:
        if self._all is not None:
            self._all.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
