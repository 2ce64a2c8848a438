"""The study: which runs there are, in which order, and what is kept when something stops them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .config import OPTIMIZERS, TUNE_SEEDS, RunSpec, StudyConfig, TaskConfig, why_unavailable
from .data import Data
from .train import Progress, RunResult

Run = Callable[[RunSpec, Data, Progress], RunResult]

_MOST_RATES = 10  # a search that has tried so many learning rates ends where it is


@dataclass
class About:
    """What does not change during a study.

    Attributes:
        data: By task, where its data come from, with their sha256.
        device: ``"cpu"`` or ``"cuda"``.
        isolated: Whether each run has a process of its own.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    git: str | None = None
    started: str = ""
    device: str = "cpu"
    isolated: bool = False


@dataclass
class Study:
    """A study and what has become of it so far.

    Attributes:
        skipped: Optimizer or task → why it is not run.
        runs: Finished runs, in order, failed ones included; read back ones come first.
        done, planned: How many of the runs that the study needs there are, and how many it needs;
            a search that goes on beyond its grid adds to the latter.
        state: ``"running"``, ``"complete"`` or ``"interrupted"``.
    """

    config: StudyConfig
    about: About = field(default_factory=About)
    skipped: dict[str, str] = field(default_factory=dict)
    runs: list[RunResult] = field(default_factory=list)
    done: int = 0
    planned: int = 0
    state: str = "running"
    seconds: float = 0.0

    def usable(self) -> list[str]:
        """Return the optimizers that are run."""
        return [name for name in self.config.optimizers if name not in self.skipped]

    def tasks(self) -> list[TaskConfig]:
        """Return the tasks that are run."""
        return [task for task in self.config.tasks if task.name not in self.skipped]

    def seeds(self, optimizer: str) -> tuple[int, ...]:
        """Return an optimizer's seeds: fewer for one that is slow on a CPU, if it runs on one."""
        slow = self.about.device == "cpu" and OPTIMIZERS[optimizer].slow_on_cpu
        return self.config.seeds[: self.config.slow_seeds if slow else None]

    def of(self, purpose: str, task: str, optimizer: str) -> list[RunResult]:
        """Return the runs of a purpose, failed ones included."""
        wanted = (purpose, task, optimizer)
        return [run for run in self.runs if (run.purpose, run.task, run.optimizer) == wanted]

    def final(self, task: str, optimizer: str, lr: float | None = None) -> list[RunResult]:
        """Return the reported runs that ended well, at its own learning rate or at ``lr``."""
        lr = self.learning_rate(task, optimizer) if lr is None else lr
        return [
            run
            for run in self.of("final", task, optimizer)
            if run.status == "ok" and run.lr == lr and run.seed in self.config.seeds
        ]

    def ran(self, task: str) -> list[str]:
        """Return the optimizers with at least one reported run of the task, in order."""
        return [name for name in self.usable() if self.final(task, name)]

    def failed(self) -> list[RunResult]:
        """Return the runs that failed.

        Divergence is a failure at an optimizer's own learning rate only: elsewhere it is a result.
        """
        return [
            run
            for run in self.runs
            if run.status != "ok"
            and run.optimizer in self.usable()
            and not (run.diverged and run.purpose == "tune")
            and not (run.diverged and run.lr != self.learning_rate(run.task, run.optimizer))
        ]

    def tuned(self, task: str, optimizer: str) -> dict[float, float | None]:
        """Return the search: learning rate → mean loss over its seeds, None if a run failed."""
        losses: dict[float, list[float]] = {}
        for run in self.of("tune", task, optimizer):
            ok = run.status == "ok" and run.loss is not None
            losses.setdefault(run.lr, []).extend([run.loss or 0.0] if ok else [])
        return {
            lr: statistics.fmean(found) if len(found) == len(TUNE_SEEDS) else None
            for lr, found in sorted(losses.items())
        }

    def learning_rate(self, task: str, optimizer: str) -> float:
        """Return the learning rate of the reported runs: the best of the search, or the given one.

        If every run of the search failed, the lowest that was tried: the reported run shows why.
        """
        leader = self.leader(optimizer)
        if leader != optimizer:
            return self.learning_rate(task, leader)
        if not self.searches(optimizer):
            return self.config.rate(optimizer)
        means = self.tuned(task, optimizer)
        known = {lr: loss for lr, loss in means.items() if loss is not None}
        return (
            min(known, key=known.__getitem__)
            if known
            else min(means or [self._low(task, optimizer)])
        )

    def leader(self, optimizer: str) -> str:
        """Return the optimizer whose search decides on the learning rate: itself, or another."""
        other = OPTIMIZERS[optimizer].tuned_as
        given = self.config.rates.keys() | self.config.grids.keys()
        return (
            other
            if self.config.tune and optimizer not in given and other in self.usable()
            else optimizer
        )

    def searches(self, optimizer: str) -> bool:
        """Return whether there is a search for the learning rate of this very optimizer."""
        own = self.leader(optimizer) == optimizer
        return self.config.tune and own and optimizer not in self.config.rates

    def equal_lr(self, task: str) -> float | None:
        """Return the learning rate that every optimizer is run at as well, or None."""
        given = self.config.equal_lr
        if given is None:
            return self.learning_rate(task, self.usable()[0]) if self.usable() else None
        return given or None

    def at_edge(self, task: str, optimizer: str) -> bool:
        """Return whether the search ended at the lowest or highest learning rate it tried."""
        tried = self.tuned(task, optimizer)
        if not self.searches(optimizer) or len(tried) < 2:
            return False
        return self.learning_rate(task, optimizer) in (min(tried), max(tried))

    def peak_memory(self, task: str, optimizer: str) -> list[int]:
        """Return peaks in bytes: of the run made for it or, without one, of the reported runs."""
        own = [run.peak_memory for run in self.of("memory", task, optimizer)]
        peaks = own or [run.peak_memory for run in self.final(task, optimizer)]
        return [peak for peak in peaks if peak is not None]

    # ---- the plan ----

    def plan(self) -> Iterator[RunSpec]:
        """Yield the runs, looking at the finished ones: later ones depend on earlier ones.

        Seeds are the outer loop, so that a study that is stopped early has compared the optimizers
        on the seeds it got to.
        """
        if self.about.device == "cpu" and self.about.isolated:
            # The reported runs show also what the allocator keeps.
            for task in self.tasks():
                short = replace(task, steps=3, eval_items=task.batch_size, eval_every=0)
                for name in self.usable():
                    # The size of the steps does not matter here; it only has to be small enough.
                    yield self._spec(
                        "memory", short, name, self.config.seeds[0], self._low(task.name, name)
                    )
        for task in self.tasks():
            for name in filter(self.searches, self.usable()):
                for lr in self._search(task.name, name):
                    for seed in TUNE_SEEDS:
                        yield self._spec("tune", task, name, seed, lr)
        for task in self.tasks():
            for equal in (False, True):
                for seed in self.config.seeds:
                    for name in self.usable():
                        lr = own = self.learning_rate(task.name, name)
                        if equal:
                            lr = self.equal_lr(task.name) or own
                        if (not equal or lr != own) and seed in self.seeds(name):
                            yield self._spec("final", task, name, seed, lr)

    def _search(self, task: str, optimizer: str) -> Iterator[float]:
        """Yield the grid, then factors of two beyond it while the best lies at its edge."""
        tried = set(self._grid(task, optimizer))
        yield from sorted(tried)
        while optimizer not in self.config.grids and len(tried) < _MOST_RATES:
            best = self.learning_rate(task, optimizer)
            if not self.tuned(task, optimizer).keys() >= tried or min(tried) < best < max(tried):
                return  # not finished, or done
            beyond = max(tried) * 2 if best >= max(tried) else min(tried) / 2
            tried.add(beyond)
            yield beyond

    def _grid(self, task: str, optimizer: str) -> tuple[float, ...]:
        (config,) = (each for each in self.config.tasks if each.name == task)
        return self.config.grid(optimizer, config)

    def _low(self, task: str, optimizer: str) -> float:
        return min(self.config.rates.get(optimizer, 1.0), *self._grid(task, optimizer))

    def _spec(self, purpose: str, task: TaskConfig, name: str, seed: int, lr: float) -> RunSpec:
        precision, cpu = self.config.mixed_precision, self.config.cpu
        return RunSpec(purpose, task, name, seed, lr, precision, cpu)


def available(config: StudyConfig) -> dict[str, str]:
    """Return why each optimizer that is not installed here is not run."""
    reasons = {name: why_unavailable(name) for name in config.optimizers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def run_study(
    study: Study,
    data: dict[str, Data],
    run: Run,
    *,
    save: Callable[[Study], None],
    watch: Callable[[RunSpec], contextlib.AbstractContextManager[Progress]],
) -> None:
    """Do the runs of ``study.plan()`` that ``study.runs`` does not hold yet, and add them to it.

    On KeyboardInterrupt what is finished stays, ``study.state`` says so, and the function returns.

    Args:
        study: Receives the results.
        data: By task name, its data.
        run: Does one run.
        save: Called after every run and at the end.
        watch: Given a run that is about to start, shows its progress.
    """
    started = time.perf_counter() - study.seconds
    finished = {run.key for run in study.runs}
    study.state = "running"
    try:
        for spec in study.plan():
            if spec.key in finished:
                continue
            keys = [planned.key for planned in study.plan()]
            study.planned, study.done = len(keys), len(finished.intersection(keys))
            with watch(spec) as progress:
                result = run(spec, data[spec.task.name], progress)
                result.git = study.about.git
                study.runs.append(result)
                finished.add(spec.key)
                study.seconds = time.perf_counter() - started
                save(study)
        study.state = "complete"
    except KeyboardInterrupt:
        study.state = "interrupted"
    keys = [planned.key for planned in study.plan()]
    study.planned, study.done = len(keys), len(finished.intersection(keys))
    study.seconds = time.perf_counter() - started
    save(study)
