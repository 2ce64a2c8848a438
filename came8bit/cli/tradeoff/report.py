"""The report: a table, what is noise, and how everything was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from came8bit.cli.tradeoff import noise
from came8bit.cli.tradeoff.config import TUNE_SEEDS, TaskConfig
from came8bit.cli.tradeoff.models import describe
from came8bit.cli.tradeoff.optimizers import OPTIMIZERS, label
from came8bit.cli.tradeoff.stats import deviation, mean
from came8bit.cli.tradeoff.study import Study, at_grid_edge, seeds_of
from came8bit.cli.tradeoff.train import RunResult

_HEADER = ["optimizer", "lr", "seeds", "validation loss", "accuracy", "state B/param"]
_HEADER += ["peak memory MiB", "optimizer step ms", "whole step ms"]


def write_report(study: Study, command: str) -> str:
    """Return the report as Markdown. ``command`` is the command line that makes it again."""
    parts = [f"# Accuracy against optimizer bytes: preset {study.config.preset}"]
    if study.state != "complete":
        parts.append(
            f"**Partial: {study.state} after {len(study.runs)} of {study.planned} runs.** What "
            f"follows covers the finished ones."
        )
    for task in study.config.tasks:
        if study.final(task.kind):
            parts += _task_section(study, task)
    if study.skipped:
        reasons = [f"* {_name(key)}: {reason}" for key, reason in study.skipped.items()]
        parts += ["## Skipped", "\n".join(reasons)]
    if study.failed():
        parts += ["## Failed", "\n".join(map(_failure, study.failed()))]
    parts += ["## How", "\n".join(_how(study)), f"Made by `{command}`."]
    return "\n\n".join(parts) + "\n"


def _task_section(study: Study, task: TaskConfig) -> Iterator[str]:
    runs = study.final(task.kind)
    items = f"{task.batch_size * task.accumulate}"
    items += f" × {task.context} bytes" if task.context else " images"
    yield f"## {task.kind.capitalize()}"
    yield (
        f"{describe(task)}: {runs[0].parameters:,} parameters, {100 * runs[0].wide_fraction:.0f} % "
        f"of them in matrices at least 256 wide. {task.steps} steps of {items}. "
        f"Data: {study.about['data'][task.kind]['source']}."
    )
    yield "\n".join(_table(study, task))
    counts = {len(study.final(task.kind, name)) for name in study.ran(task.kind)}
    if len(counts) > 1:
        yield "\\* fewer seeds than the others."
    edges = [name for name in study.ran(task.kind) if at_grid_edge(study, task.kind, name)]
    if edges:
        yield (
            f"The search for {', '.join(map(label, edges))} ended at the edge of its grid: a "
            f"better learning rate may lie beyond."
        )
    yield "### What is noise"
    yield from noise.in_words(study, task)


def _table(study: Study, task: TaskConfig) -> Iterator[str]:
    """Yield the lines of a Markdown table whose columns also line up as plain text."""
    names = study.ran(task.kind)
    most = max(len(study.final(task.kind, name)) for name in names)
    rows = [_HEADER]
    rows += [_row(study, task, name, most) for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            rules = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
            yield "| " + " | ".join(rules) + " |"


def _row(study: Study, task: TaskConfig, name: str, most: int) -> list[str]:
    runs = study.final(task.kind, name)
    return [
        label(name) + ("*" if len(runs) < most else ""),
        f"{runs[0].lr:g}",
        str(len(runs)),
        _spread([r.loss for r in runs], 4),
        _spread([None if r.accuracy is None else 100 * r.accuracy for r in runs], 1, " %"),
        f"{mean([r.bytes_per_parameter or 0.0 for r in runs]):.3f}",
        _spread([peak / 2**20 for peak in study.peak_memory(task.kind, name)], 1),
        f"{mean([r.optimizer_ms['p50'] for r in runs]):.2f}",
        f"{mean([r.step_ms['p50'] for r in runs]):.1f}",
    ]


def _spread(values: list[float | None], digits: int, unit: str = "") -> str:
    """Return mean ± standard deviation; a single value stands alone."""
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    spread = deviation(known)
    text = f"{mean(known):.{digits}f}"
    return text + (f" ± {spread:.{digits}f}" if spread is not None else "") + unit


def _how(study: Study) -> Iterator[str]:
    """Yield the bullet points on device, versions, data, search and measures."""
    about, config = study.about, study.config
    runs = [run for run in study.runs if run.status == "ok"]
    yield _device(about, runs[0].device if runs else "none", config.mixed_precision)
    kernel = about["kernels"]["cpu"]
    loaded = f"loaded ({kernel['isa']})" if kernel["loaded"] else f"NOT loaded: {kernel['reason']}"
    yield f"* came8bit's CPU kernels: {loaded}."
    versions = [f"{name} {version}" for name, version in about["versions"].items() if version]
    yield f"* Versions: {', '.join(versions)}; source: {about['git'] or 'not a git checkout'}."
    for task in config.tasks:
        if task.kind in about["data"]:
            yield _training(task, about["data"][task.kind])
    yield from _learning_rates(study)
    few = [n for n in config.optimizers if len(_seeds(study, n, runs)) < len(config.seeds)]
    if few:
        yield f"* Fewer seeds by design, because slow on a CPU: {', '.join(map(label, few))}."
    yield (
        "* State: bytes of the storages in `optimizer.state` after the last step, each counted "
        "once, per trainable parameter. Step times: medians, averaged over seeds. ±: standard "
        "deviation over seeds."
    )
    yield _memory(study, runs)


def _memory(study: Study, runs: list[RunResult]) -> str:
    methods = sorted({run.memory_method for run in runs if run.memory_method})
    if not methods:
        return "* Peak memory: this system offers no way to measure it."
    if any(run.purpose == "memory" for run in runs):
        whose = "of a run of 3 steps, alone in a process whose allocator keeps nothing"
    elif study.about["isolated"]:
        whose = "each run in a process of its own"
    else:
        whose = "all runs in one process, which blurs it on a CPU"
    return (
        f"* Peak memory: {', '.join(methods)}, above the level before the model was built; "
        f"{whose}. It holds weights, gradients, activations, state and temporaries."
    )


def _device(about: dict[str, Any], device: str, precision: str) -> str:
    hardware = about["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) if device == "cuda" else ""
    return (
        f"* Device: {device}{f' ({gpus})' if gpus else ''}; {hardware['cpu']}, "
        f"{hardware['cores']} cores, {hardware['torch_threads']} threads; mixed precision: "
        f"{precision}."
    )


def _training(task: TaskConfig, source: dict[str, Any]) -> str:
    after = "constant" if task.schedule == "constant" else "a cosine to a tenth"
    clipped = f"clipped to norm {task.max_grad_norm:g}" if task.max_grad_norm else "not clipped"
    return (
        f"* {task.kind.capitalize()}: {source['source']}, sha256 {source['sha256'][:16]}; "
        f"{source['split']}. Learning rate: linear warm-up over {task.warmup_steps} steps, then "
        f"{after}; weight decay {task.weight_decay:g}; gradients {clipped}. The same for every "
        f"optimizer."
    )


def _learning_rates(study: Study) -> Iterator[str]:
    if not study.config.tune:
        yield (
            "* Peak learning rates: given, not searched for. Those of the preset are the best of a "
            "grid, found with `--tune` (docs/tradeoff.md)."
        )
        return
    for task in study.config.tasks:
        for name in study.ran(task.kind):
            means = study.tuned(task.kind, name).items()
            tried = (f"{lr:g}: {'failed' if x is None else f'{x:.4f}'}" for lr, x in means)
            yield (
                f"* Search on {task.kind}, {label(name)} (lr: loss on the tuning split, mean of "
                f"{len(TUNE_SEEDS)} other seeds): {', '.join(tried)}."
            )


def _seeds(study: Study, optimizer: str, runs: list[RunResult]) -> tuple[int, ...]:
    return seeds_of(study.config, optimizer, bool(runs) and runs[0].device == "cpu")


def _failure(run: RunResult) -> str:
    return f"* {label(run.optimizer)} on {run.task}, seed {run.seed}, lr {run.lr:g}: {run.error}"


def _name(key: str) -> str:
    return label(key) if key in OPTIMIZERS else f"task {key}"
