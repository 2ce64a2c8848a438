"""The report: a table, which differences count, and how everything was measured."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import rich.box
import rich.console
import rich.table
from scipy import stats

from .config import OPTIMIZERS, TUNE_SEEDS, TaskConfig, label
from .models import MODELS
from .study import Study
from .train import RunResult

# ---- which differences count ----


@dataclass(frozen=True)
class Paired:
    """A comparison of two optimizers over the seeds that both have run.

    Attributes:
        pairs: Number of common seeds.
        difference: Mean of (first − second).
        low, high: Ends of the 95 % interval (Student's t); None for one pair.
        p_equal: Of the test that the two differ by ``margin`` or more (two one-sided t tests);
            None for one pair.
    """

    pairs: int
    difference: float
    low: float | None = None
    high: float | None = None
    p_equal: float | None = None

    @property
    def outside_noise(self) -> bool | None:
        """Whether the interval leaves out 0; None if there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0

    @property
    def equal(self) -> bool:
        """Whether a difference as large as the margin is ruled out, at 5 %."""
        return self.p_equal is not None and self.p_equal < 0.05


def paired(
    first: dict[int, float], second: dict[int, float], margin: float = 0.005
) -> Paired | None:
    """Compare values seed by seed; None without a common seed."""
    seeds = sorted(first.keys() & second.keys())
    differences = [first[seed] - second[seed] for seed in seeds]
    if not seeds:
        return None
    centre = statistics.fmean(differences)
    if len(seeds) == 1:
        return Paired(1, centre)
    if max(differences) == min(differences):  # bit-equal runs: nothing to estimate a spread from
        return Paired(len(seeds), centre, centre, centre, float(abs(centre) >= margin))
    low, high = stats.ttest_rel(
        [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    ).confidence_interval(0.95)
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return Paired(len(seeds), centre, float(low), float(high), float(max(above, below)))


def losses_by_seed(study: Study, task: str, name: str, lr: float | None = None) -> dict[int, float]:
    """Return seed → validation loss, at the optimizer's own learning rate or at ``lr``."""
    return {r.seed: r.loss for r in study.final(task, name, lr) if r.loss is not None}


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs worth comparing: each with the first, and each with the widest of its rule.

    Arms of one rule differ in bits alone; the widest is the one that comes first.
    """
    pairs = [(name, names[0]) for name in names[1:]]
    for name in names:
        rule = OPTIMIZERS[name].rule
        widest = next(other for other in names if OPTIMIZERS[other].rule == rule)
        if rule and name != widest != names[0]:
            pairs.append((name, widest))
    return pairs


def verdict(result: Paired | None, first: str, second: str, margin: float) -> str:
    """Say in a few words what a comparison has shown."""
    if result is None:
        return "no seed in common: not comparable"
    if result.low is None or result.high is None:
        return "one seed: no interval, so nothing can be said"
    better = label(first if result.difference < 0 else second)
    if result.equal:
        close = f"equal within {margin:g}"
        return f"{close} ({better} is better)" if result.outside_noise else f"**{close}**"
    if result.outside_noise:
        return f"**outside the noise**: {better} is better"
    most = max(abs(result.low), abs(result.high))
    return f"inside the noise: up to {number(most)[1:]} apart"


def number(value: float) -> str:
    """Return the signed number with four decimals, or two digits where those would be zeros."""
    small = 1e-12 < abs(value) < 5e-4
    return f"{value:+.1e}" if small else f"{value:+.4f}"


def evaluation_error(study: Study, task: TaskConfig) -> float | None:
    """Return the largest standard error of a loss difference, over pairs at the first seed.

    From the pieces of the validation split: the spread of the pieces' differences over the root of
    their number. None if fewer than two optimizers have run that seed.
    """
    runs = [run for name in study.ran(task.name) for run in study.final(task.name, name)]
    first_seed = [run for run in runs if run.seed == study.config.seeds[0]]
    errors = [
        statistics.stdev(a - b for a, b in zip(one.loss_parts, other.loss_parts, strict=True))
        / math.sqrt(len(one.loss_parts))
        for i, one in enumerate(first_seed)
        for other in first_seed[:i]
        if len(one.loss_parts) > 1
    ]
    return max(errors, default=None)


def in_words(study: Study, task: TaskConfig) -> Iterator[str]:
    """Yield Markdown paragraphs: each comparison, and how much they can be trusted."""
    names, margin = study.ran(task.name), study.config.margin
    rows = []
    equal_lr = study.equal_lr(task.name)
    for lr in (None, equal_lr) if equal_lr else (None,):
        for first, second in comparisons(names):
            if lr and {study.learning_rate(task.name, name) for name in (first, second)} == {lr}:
                continue  # the same runs as above
            one, other = (losses_by_seed(study, task.name, name, lr) for name in (first, second))
            if lr and not (one and other):
                continue
            result = paired(one, other, margin)
            interval = ""
            if result and result.low is not None and result.high is not None:
                interval = f"{number(result.low)} to {number(result.high)}"
            rows.append(
                [
                    f"{label(first)} − {label(second)}",
                    f"{lr:g}" if lr else "own",
                    number(result.difference) if result else "",
                    interval,
                    str(result.pairs if result else 0),
                    verdict(result, first, second, margin),
                ]
            )
    if not rows:
        yield "Only one optimizer has run: there is nothing to compare."
        return
    unit = MODELS[task.model].unit
    header = ["difference", "lr", unit, "95 % interval", "seeds", "verdict"]
    yield table(header, rows)
    yield (
        "Every optimizer starts from the same weights and sees the same batches for the same seed, "
        "so losses are compared seed by seed. A difference is *outside the noise* when the 95 % "
        "interval of its mean (Student's t) leaves out zero, and two optimizers are *equal* when a "
        f"difference of {margin:g} or more is ruled out (two one-sided t tests, each at 5 %). The "
        f"intervals are not corrected for the {len(rows)} comparisons: of 20 without a difference, "
        "one leaves out zero by chance."
    )
    fewest = min(int(row[4]) for row in rows)
    if 2 <= fewest <= 4:
        factor = stats.t.ppf(0.975, fewest - 1) / math.sqrt(fewest)
        yield (
            f"With {fewest} seeds an interval is ± {factor:.1f} standard deviations of the "
            f"differences: a weak test. More `--seeds` make it sharper."
        )
    if {"came-published", "came-pytorch"} <= set(names):
        yield (
            "CAME as published and came-pytorch follow the same rule, so what separates them is "
            "rounding, amplified by training: differences of that size mean nothing, whatever an "
            "interval says."
        )
    error = evaluation_error(study, task)
    if error is not None:
        items = f"{study.final(task.name, names[0])[0].eval_items:,}"
        yield (
            f"All runs are evaluated on the same {items} "
            f"{task.items}. With another choice of them, a difference "
            f"between two runs would change by about {error:.4f} (its standard error)."
        )


# ---- the report ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up as plain text."""
    made = rich.table.Table(box=rich.box.MARKDOWN)
    for place, title in enumerate(header):
        numeric = (
            place and rows and all(row[place][-1:].isdigit() or not row[place] for row in rows)
        )
        made.add_column(title, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(rich.text.Text(cell) for cell in row))
    console = rich.console.Console(file=io.StringIO(), width=10_000, color_system=None)
    console.print(made)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def spread(values: Sequence[float | None], digits: int, unit: str = "") -> str:
    """Return mean ± standard deviation; a single value stands alone."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.fmean(known):.{digits}f}"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return text + deviation + unit


def seeds_in_words(counts: Sequence[int]) -> str:
    """Return the number of seeds, or the numbers where optimizers have different ones."""
    distinct = sorted(set(counts))
    return " or ".join(map(str, distinct)) + (" seed" if distinct == [1] else " seeds")


def write_report(study: Study, command: str) -> str:
    """Return the report as Markdown. ``command`` is the command line that makes it again."""
    parts = [f"# Loss against optimizer bytes: preset {study.config.preset}"]
    if study.state != "complete":
        parts.append(
            f"**Partial: {study.state} after {study.done} of {study.planned} runs.** What follows "
            f"covers the finished ones; the same command goes on where it stopped."
        )
    for task in study.tasks():
        if study.ran(task.name):
            parts += _task_section(study, task)
    if study.skipped:
        reasons = [f"* {_name(key)}: {reason}" for key, reason in study.skipped.items()]
        parts += ["## Skipped", "\n".join(reasons)]
    if study.failed():
        parts += ["## Failed", "\n".join(f"* {line}" for line in failures(study))]
    parts += ["## How", "\n".join(f"* {line}" for line in _how(study)), f"Made by `{command}`."]
    return "\n\n".join(parts) + "\n"


def failures(study: Study) -> Iterator[str]:
    """Yield one line per optimizer and error, however many of its runs it has ended."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for run in study.failed():
        key = (label(run.optimizer), run.task, str(run.error))
        seeds.setdefault(key, []).append(run.seed)
    for (name, task, error), numbers in seeds.items():
        listed = ", ".join(map(str, sorted(set(numbers))))
        yield f"{name} on {task}, seed{'s' if len(set(numbers)) > 1 else ''} {listed}: {error}"


def _task_section(study: Study, task: TaskConfig) -> Iterator[str]:
    first = study.final(task.name, study.ran(task.name)[0])[0]
    yield f"## {task.name.capitalize()}"
    yield (
        f"{MODELS[task.model].describe(task)}: {first.parameters:,} parameters, "
        f"{100 * first.wide_fraction:.0f} % of them in matrices at least 256 wide. {task.steps} "
        f"steps of {task.batch}. Data: {study.about.data[task.name]['source']}."
    )
    names, equal_lr = study.ran(task.name), study.equal_lr(task.name)
    most = max(len(study.final(task.name, name)) for name in names)
    header = ["optimizer", "state B/param", "seeds", "lr", f"loss, {MODELS[task.model].unit}"]
    header += ([f"loss at lr {equal_lr:g}"] if equal_lr else []) + ["accuracy", "peak memory MiB"]
    header += ["optimizer step ms", "whole step ms"]
    yield table(header, [_row(study, task, name, most, equal_lr) for name in names])
    yield (
        "The first loss is at each optimizer's own learning rate, "
        + ("searched for" if study.config.tune else "given")
        + "; ±: standard deviation over seeds."
        + (" \\*: fewer seeds than the others." if _few(study, names, task, most) else "")
    )
    edges = [name for name in names if study.at_edge(task.name, name)]
    if edges:
        yield (
            f"The search for {', '.join(map(label, edges))} ended at the lowest or highest "
            f"learning rate that it tried: a better one may lie beyond."
        )
    yield "### What is noise"
    yield from in_words(study, task)


def _few(study: Study, names: Sequence[str], task: TaskConfig, most: int) -> list[str]:
    return [name for name in names if len(study.final(task.name, name)) < most]


def _row(study: Study, task: TaskConfig, name: str, most: int, equal: float | None) -> list[str]:
    runs = study.final(task.name, name)
    row = [
        label(name) + ("*" if len(runs) < most else ""),
        f"{statistics.fmean(r.bytes_per_parameter or 0.0 for r in runs):.3f}",
        str(len(runs)),
        f"{runs[0].lr:g}",
        spread([r.loss for r in runs], 4),
    ]
    if equal:
        all_runs = [run for run in study.of("final", task.name, name) if run.lr == equal]
        diverged = sum(run.diverged for run in all_runs)
        at_equal = spread([run.loss for run in study.final(task.name, name, equal)], 4)
        lost = f"{diverged} of {len(all_runs)} diverged" if diverged else ""
        row.append("; ".join(filter(None, (at_equal, lost))))
    return [
        *row,
        spread([None if r.accuracy is None else 100 * r.accuracy for r in runs], 1, " %"),
        spread([peak / 2**20 for peak in study.peak_memory(task.name, name)], 1),
        f"{statistics.fmean(r.optimizer_ms['p50'] for r in runs):.2f}",
        f"{statistics.fmean(r.step_ms['p50'] for r in runs):.1f}",
    ]


def _how(study: Study) -> Iterator[str]:
    """Yield the bullet points on device, versions, data, search and measures."""
    about, config = study.about, study.config
    hardware = about.hardware
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"]) if about.device == "cuda" else ""
    yield (
        f"Device: {about.device}{f' ({gpus})' if gpus else ''}; {hardware['cpu']}, "
        f"{hardware['cores']} cores, {hardware['torch_threads']} threads; mixed precision: "
        f"{config.mixed_precision}."
    )
    kernel = about.kernels["cpu"]
    loaded = f"loaded ({kernel['isa']})" if kernel["loaded"] else f"NOT loaded: {kernel['reason']}"
    yield f"came8bit's CPU kernels: {loaded}."
    versions = [f"{name} {version}" for name, version in about.versions.items() if version]
    revisions = dict.fromkeys(run.git or "not a git checkout" for run in study.runs)
    yield f"Versions: {', '.join(versions)}; source: {', '.join(revisions)}."
    arms = ", ".join(f"{label(name)} `{OPTIMIZERS[name].call}`" for name in study.usable())
    yield f"Optimizers: {arms}."
    for task in study.tasks():
        source = about.data[task.name]
        after = "constant" if task.schedule == "constant" else f"a cosine to {task.floor:g} of it"
        clipped = f"clipped to norm {task.max_grad_norm:g}" if task.max_grad_norm else "not clipped"
        yield (
            f"{task.name.capitalize()}: {source['source']}, sha256 {source['sha256'][:16]}; "
            f"{source['split']}. Learning rate: linear warm-up over {task.warmup_steps} steps, "
            f"then {after}; weight decay {task.weight_decay:g}; gradients {clipped}. The same for "
            f"every optimizer."
        )
    yield from _learning_rates(study)
    few = [name for name in study.usable() if len(study.seeds(name)) < len(config.seeds)]
    if few:
        yield f"Fewer seeds by design, because slow on a CPU: {', '.join(map(label, few))}."
    yield (
        "State: bytes of the storages in `optimizer.state` after the last step, each counted once, "
        "per trainable parameter. Step times: medians, averaged over seeds."
    )
    yield _memory(study, [run for run in study.runs if run.status == "ok"])


def _learning_rates(study: Study) -> Iterator[str]:
    if not study.config.tune:
        yield (
            "Peak learning rates: given, not searched for in this run; `--tune` searches for each "
            "optimizer's own."
        )
        return
    for task in study.tasks():
        for name in filter(study.searches, study.ran(task.name)):
            means = study.tuned(task.name, name).items()
            tried = (f"{lr:g}: {'failed' if x is None else f'{x:.4f}'}" for lr, x in means)
            yield (
                f"Search on {task.name}, {label(name)} (lr: loss on the tuning split, mean of "
                f"{len(TUNE_SEEDS)} other seeds): {', '.join(tried)}."
            )
    followers = [name for name in study.usable() if study.leader(name) != name]
    if followers:
        pairs = (f"{label(name)} that of {label(study.leader(name))}" for name in followers)
        yield f"Learning rates taken from the search of another: {', '.join(pairs)}."


def _memory(study: Study, runs: Sequence[RunResult]) -> str:
    methods = sorted({run.memory_method for run in runs if run.memory_method})
    if not methods:
        return "Peak memory: this system offers no way to measure it."
    if any(run.purpose == "memory" for run in runs):
        whose = "of a run of 3 steps, alone in a process whose allocator keeps nothing"
    elif study.about.isolated:
        whose = "each run in a process of its own"
    else:
        whose = "all runs in one process, which blurs it on a CPU"
    return (
        f"Peak memory: {', '.join(methods)}, above the level before the model was built; {whose}. "
        f"It holds weights, gradients, activations, state and temporaries."
    )


def _name(key: str) -> str:
    return label(key) if key in OPTIMIZERS else f"task {key}"
