"""The report: a table, what is noise, and how everything was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .config import OPTIMIZERS, TUNE_SEEDS, TaskConfig, label
from .models import describe
from .study import Study, at_grid_edge, seeds_of
from .train import RunResult

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
    yield from in_words(study, task)


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


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n − 1), or None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class Paired:
    """A comparison of two optimizers over the seeds that both have run.

    Attributes:
        pairs: Number of common seeds.
        difference: Mean of (first − second).
        deviation: Standard deviation of the differences; None for one pair.
        low, high: Ends of the interval; None for one pair.
    """

    pairs: int
    difference: float
    deviation: float | None
    low: float | None
    high: float | None

    @property
    def outside_noise(self) -> bool | None:
        """Whether the interval leaves out 0; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def paired(
    first: dict[int, float], second: dict[int, float], confidence: float = 0.95
) -> Paired | None:
    """Compare values by seed with a t interval of their differences; None without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    centre, spread = mean(differences), deviation(differences)
    if spread is None:
        return Paired(1, centre, None, None, None)
    half = interval_factor(len(seeds), confidence) * spread
    return Paired(len(seeds), centre, spread, centre - half, centre + half)


def interval_factor(n: int, confidence: float = 0.95) -> float:
    """Return t/√n: half the interval of a mean of n ≥ 2 values, in standard deviations."""
    return t_quantile(0.5 + confidence / 2, n - 1) / math.sqrt(n)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution for ``probability`` in [0.5, 1).

    By bisection of the distribution function: with t = √ν·tan θ the density becomes cos^(ν−1) θ,
    smooth and bounded, which Simpson's rule integrates to about ten digits.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def distribution(angle: float) -> float:
        steps = 400
        width = angle / steps
        total = 1.0 + math.cos(angle) ** (degrees - 1)
        for i in range(1, steps):
            total += (4 if i % 2 else 2) * math.cos(i * width) ** (degrees - 1)
        return 0.5 + scale * total * width / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


#: Units of the losses, by task kind.
UNITS = {"text": "nat per byte", "vision": "nat per image"}

# Both compute CAME in fp32: what differs is the rounding of single operations.
_SAME_RULE = ("came", "came-pytorch")


def losses_by_seed(study: Study, task: str) -> dict[str, dict[int, float]]:
    """Return optimizer → seed → validation loss."""
    return {
        name: {r.seed: r.loss for r in study.final(task, name) if r.loss is not None}
        for name in study.ran(task)
    }


def comparisons(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs worth comparing: CAME8bit with everything, and CAME with came-pytorch.

    Without CAME8bit the last optimizer takes its place.
    """
    if len(names) < 2:
        return []
    main = "came8bit" if "came8bit" in names else names[-1]
    pairs = [(main, name) for name in reversed(names) if name != main]
    if main == "came8bit" and set(_SAME_RULE) <= set(names):
        pairs.append(_SAME_RULE)
    return pairs


def in_words(study: Study, task: TaskConfig) -> Iterator[str]:
    """Yield Markdown paragraphs: the method, each comparison, and how much they can be trusted."""
    losses = losses_by_seed(study, task.kind)
    results = [(a, b, paired(losses[a], losses[b])) for a, b in comparisons(list(losses))]
    if not results:
        yield "Only one optimizer has run: there is nothing to compare."
        return
    yield (
        "Every optimizer starts from the same weights and sees the same batches for the same seed, "
        "so losses are compared seed by seed. The noise is the spread of those differences: a "
        "difference counts when the 95 % interval of its mean (Student's t) leaves out zero. Each "
        "interval stands for itself: of comparisons where nothing differs, one in twenty leaves "
        "out zero by chance."
    )
    unit = UNITS[task.kind]
    yield "\n".join(f"* {_sentence(a, b, result, unit)}" for a, b, result in results)
    pairs = [result.pairs for _, _, result in results if result is not None]
    if pairs and 2 <= min(pairs) <= 4:
        yield (
            f"With {min(pairs)} seeds the interval is ± {interval_factor(min(pairs)):.1f} standard "
            f"deviations of the differences: a weak test, which sees only differences that are "
            f"large against their spread. More `--seeds` make it sharper."
        )
    if set(_SAME_RULE) <= set(losses):
        yield (
            "CAME and came-pytorch follow the same rule, so what separates them is rounding, blown "
            "up by training: differences of that size mean nothing, whatever an interval says."
        )
    error = evaluation_error(study, task)
    if error is not None:
        items = f"{study.final(task.kind)[0].eval_items:,}"
        yield (
            f"All runs are evaluated on the same {items} "
            f"{'windows' if task.kind == 'text' else 'images'}. With another choice of them, a "
            f"difference between two runs would change by about {error:.4f} (its standard error)."
        )


def _sentence(first: str, second: str, result: Paired | None, unit: str) -> str:
    text = f"{label(first)} − {label(second)}: "
    if result is None:
        return text + "no common seed, so nothing can be said."
    text += f"{_number(result.difference)} {unit}"
    if result.low is None or result.high is None:
        return text + ". One common seed: no interval, so nothing can be said."
    text += f" [{_number(result.low)}, {_number(result.high)}], {result.pairs} seeds: "
    if result.outside_noise:
        better = first if result.difference < 0 else second
        return text + f"**outside the noise**, {label(better)} is better."
    most = max(abs(result.low), abs(result.high))
    return text + f"**inside the noise**. Not shown to be equal: up to {_number(most)[1:]} apart."


def _number(value: float) -> str:
    """Return the signed number with four decimals, or two digits where those would be zeros."""
    small = 1e-12 < abs(value) < 5e-4
    return f"{value:+.1e}" if small else f"{value:+.4f}"


def evaluation_error(study: Study, task: TaskConfig) -> float | None:
    """Return the largest standard error of a loss difference, over pairs at the first seed.

    From the pieces of the validation split: the spread of the pieces' differences over the root of
    their number. None if fewer than two optimizers have run that seed.
    """
    first_seed = [r for r in study.final(task.kind) if r.seed == study.config.seeds[0]]
    errors = []
    for i, one in enumerate(first_seed):
        for other in first_seed[:i]:
            differences = [a - b for a, b in zip(one.loss_parts, other.loss_parts, strict=True)]
            spread = deviation(differences)
            if spread is not None:
                errors.append(spread / len(differences) ** 0.5)
    return max(errors, default=None)
