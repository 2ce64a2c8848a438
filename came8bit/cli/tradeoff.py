"""``came8bit tradeoff``: the command line of studies, their progress and their output."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import environment
from ..environment import terminal
from ..errors import CliError
from ..tradeoff.config import (
    CORPORA,
    OPTIMIZERS,
    PRESETS,
    TASKS,
    TUNE_SEEDS,
    RunSpec,
    StudyConfig,
    label,
    preset_config,
)

if TYPE_CHECKING:  # what needs the extra is imported when a study runs
    from ..tradeoff.results import Folder
    from ..tradeoff.study import Study
    from ..tradeoff.train import Progress, RunResult

# Arguments that change the field of the same name in every task that uses it.
_CHANGES = (
    *("steps", "batch_size", "accumulate", "layers", "width", "heads", "context", "warmup_steps"),
    *("schedule", "floor", "eval_items", "eval_every", "weight_decay"),
)
_NEEDED = ("accelerate", "transformers", "matplotlib", "rich", "scipy")
_MOST_ITEMS = 10**9  # windows or images in a run: their order is held in memory
_LARGEST_LR = 1e9  # that CAME takes

_HELP = {
    "--preset": "default: %(default)s",
    "--optimizers": f"from: {', '.join(OPTIMIZERS)}; the others are compared with the first",
    "--out": "goes on with the same study if that is there, and sets any other aside "
    "(default: results/tradeoff-PRESET-DATE-TIME)",
    "--fresh": "start over, whatever --out holds",
    "--tasks": f"from: {', '.join(TASKS)}",
    "--text": "train on these files",
    "--corpus": f"without --text, from: {', '.join(CORPORA)}; stdlib, the default, is the source "
    "code of Python's standard library, the others come from `make data`",
    "--data-dir": "where `make data` put them (default: data)",
    "--seeds": "number of seeds",
    "--first-seed": "the others follow it (default: %(default)s)",
    "--slow-seeds": "for what is slow on a CPU",
    "--accumulate": "backward passes per step",
    "--context": "bytes per window of text",
    "--floor": "where the cosine ends, as a fraction of the peak",
    "--eval-items": "windows or images",
    "--eval-every": "0: at the end only",
    "--tune": "search each optimizer's learning rate on a split of its own first",
    "--lr": "use this one, for every task",
    "--grid": "search these, for every task",
    "--equal-lr": "run all of them at this one, too (default: the first one's own; 0: none)",
    "--margin": "losses that differ by less count as equal (default: %(default)s)",
    "--cpu": "use the CPU although there is a GPU",
    "--in-process": "do not give each run a process of its own (peak memory is then less certain)",
}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "tradeoff",
        usage="%(prog)s [options]",
        help="train with several optimizers; compare loss, bytes of state, memory and time",
        description="Train the same model from the same seeds on real data with each optimizer, and"
        " compare validation loss, bytes of state per parameter, peak memory and step time.",
        epilog="presets: "
        + "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
        + ". Ctrl-C keeps and reports the runs that are finished; the same command with the same "
        "--out does the others.",
    )
    group: Any = parser

    def add(name: str, **words: Any) -> None:
        group.add_argument(name, help=_HELP.get(name), **words)

    def numbers(kind: type, low: float, high: float, *names: str, **words: Any) -> None:
        for name in names:
            add(name, **dict(type=_number(kind, low, high), metavar="N") | words)

    add("--preset", choices=list(PRESETS), default="quick")
    add("--optimizers", metavar="NAME,...", type=_names(OPTIMIZERS))
    add("--out", metavar="DIR", type=Path)
    add("--fresh", action="store_true")

    group = parser.add_argument_group("data (the preset decides on tasks that are not given)")
    add("--tasks", metavar="NAME,...", type=_names(TASKS))
    add("--text", metavar="FILE", type=Path, nargs="+")
    add("--corpus", metavar="NAME", choices=CORPORA, default="stdlib")
    add("--data-dir", metavar="DIR", type=Path)

    group = parser.add_argument_group("training (the preset decides what is not given)")
    numbers(int, 1, TUNE_SEEDS[0], "--seeds", "--slow-seeds")
    numbers(int, 0, TUNE_SEEDS[0], "--first-seed", default=0)
    numbers(int, 1, 10**6, "--steps", "--batch-size", "--accumulate", "--context", "--eval-items")
    numbers(int, 1, 1024, "--layers", "--heads")
    numbers(int, 1, 65536, "--width")
    numbers(int, 0, 10**6, "--warmup-steps", "--eval-every")
    numbers(float, 0, 1e6, "--weight-decay")
    add("--schedule", choices=("cosine", "constant"))
    numbers(float, 0, 1, "--floor")
    add("--mixed-precision", choices=("no", "bf16"))

    group = parser.add_argument_group("learning rates")
    add("--tune", action=argparse.BooleanOptionalAction)
    add("--lr", metavar="NAME=LR", type=_rates(1), action="append", default=[])
    add("--grid", metavar="NAME=LR,...", type=_rates(20), action="append", default=[])
    numbers(float, 0, _LARGEST_LR, "--equal-lr", metavar="LR")
    numbers(float, 0, 1e3, "--margin", metavar="NAT", default=0.005)

    group = parser.add_argument_group("where it runs")
    add("--cpu", action="store_true")
    add("--in-process", action="store_true")
    parser.set_defaults(run=run)


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return a type for argparse: a finite number from ``low`` to ``high``."""
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> Any:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a {name} from {low:,} to {high:,}"
            )
        return value

    return parse


def _names(known: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """Return a type for argparse: names with commas between them, each kept once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for name in text.split(",") if name))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            got = ", ".join(map(repr, unknown)) or "none"
            raise argparse.ArgumentTypeError(f"got {got}, expected some of {', '.join(known)}")
        return names

    return parse


def _rates(most: int) -> Callable[[str], tuple[str, tuple[float, ...]]]:
    """Return a type for argparse: an optimizer and up to ``most`` learning rates."""

    def parse(text: str) -> tuple[str, tuple[float, ...]]:
        name, _, values = text.partition("=")
        names = _names(OPTIMIZERS)(name)
        numbers: tuple[float, ...] = ()
        with contextlib.suppress(ValueError):
            numbers = tuple(float(value) for value in values.split(","))
        fit = 0 < len(numbers) <= most and all(0 < x <= _LARGEST_LR for x in numbers)
        if not fit or len(names) > 1:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected {'NAME=NUMBER' if most == 1 else 'NAME=NUMBER,...'} with "
                f"positive numbers up to {_LARGEST_LR:g}, for example {names[0]}=2e-4"
            )
        return names[0], numbers

    return parse


def study_config(args: argparse.Namespace) -> StudyConfig:
    """Return the preset's study, changed by the arguments.

    Raises:
        CliError: If arguments do not fit together.
    """
    config = preset_config(args.preset)
    optimizers = args.optimizers or config.optimizers
    known = TASKS | {task.name: task for task in config.tasks}
    tasks = [known[name] for name in args.tasks] if args.tasks else list(config.tasks)
    changes = {name: getattr(args, name) for name in _CHANGES if getattr(args, name) is not None}
    sizes = ("layers", "heads", "context")
    for i, task in enumerate(tasks):
        task = tasks[i] = replace(
            task, **{k: v for k, v in changes.items() if k not in sizes or getattr(task, k)}
        )
        _check_task(task)
    tune = config.tune if args.tune is None else args.tune
    rates = {name: values[0] for name, values in args.lr}
    found = {task.name for task in config.tasks} if not config.tune else set()
    for name in () if tune else optimizers:
        for task in tasks:
            if name not in rates and task.name not in found:
                raise CliError(
                    f"preset {args.preset} has no learning rate on {task.name} for {name}. Add "
                    f"--tune, or --lr {name}=LR"
                )
    seeds = range(args.first_seed, args.first_seed + (args.seeds or len(config.seeds)))
    if seeds.stop > TUNE_SEEDS[0]:
        raise CliError(f"got seeds up to {seeds[-1]}; from {TUNE_SEEDS[0]} on they are for --tune")
    return replace(
        config,
        tasks=tuple(tasks),
        optimizers=optimizers,
        seeds=tuple(seeds),
        slow_seeds=min(args.slow_seeds or args.seeds or config.slow_seeds, len(seeds)),
        tune=tune,
        rates=rates,
        grids=dict(args.grid),
        equal_lr=args.equal_lr,
        margin=args.margin,
        mixed_precision=args.mixed_precision or config.mixed_precision,
        cpu=args.cpu,
    )


def _check_task(task: Any) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if task.heads and task.width % task.heads:
        raise CliError(f"--width {task.width} is not a multiple of --heads {task.heads}")
    if not task.heads and task.width % 8:
        raise CliError(f"--width {task.width} is not a multiple of 8, as {task.name} needs")
    if task.batch_size % processes:
        raise CliError(f"--batch-size {task.batch_size} cannot be shared by {processes} processes")
    if (items := task.steps * task.accumulate * task.batch_size) > _MOST_ITEMS:
        raise CliError(
            f"{task.name} would take {items:,} {task.items}, more than {_MOST_ITEMS:,}. Use fewer "
            f"--steps, or a smaller --batch-size"
        )


def run(args: argparse.Namespace) -> int:
    """Run the study; returns 0, 1 if a run failed, or 130 if it was interrupted."""
    if needed := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise CliError(f"needs {', '.join(needed)}: pip install 'came8bit[cli]'")
    config = study_config(args)
    from ..tradeoff.data import load
    from ..tradeoff.results import Folder
    from ..tradeoff.study import Study, available, run_study
    from ..tradeoff.train import distributed, from_main_process, run_here, run_isolated

    isolated = not (args.in_process or distributed())
    main_process = int(os.environ.get("RANK", "0")) == 0
    study = Study(config, skipped=available(config))
    if not study.usable():
        listed = "; ".join(f"{name}: {reason}" for name, reason in study.skipped.items())
        raise CliError(f"none of the optimizers is installed: {listed}", exit_code=1)
    about = study.about
    data, missing = _invalid_is_cli_error(
        load, config.tasks, args.text, args.corpus, args.data_dir, bool(args.tasks)
    )
    study.skipped |= missing
    about.data = {task: loaded.about for task, loaded in data.items()}
    about.versions, about.hardware = environment.versions(), environment.hardware()
    about.kernels, about.git = environment.kernels(), environment.git_revision()
    about.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about.device = "cpu" if config.cpu or not torch.cuda.is_available() else "cuda"
    about.isolated = isolated

    # A polite kill keeps results, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            folder = None
            if main_process:
                now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
                folder = Folder(args.out or Path(f"results/tradeoff-{config.preset}-{now}"))
                _invalid_is_cli_error(stack.enter_context, folder)
                study.runs = [] if args.fresh else _invalid_is_cli_error(folder.read, study)
                _announce(study, folder.path, None if study.runs else folder.set_aside())
            if distributed():
                study.runs = from_main_process(study.runs, config.cpu)
            progress = stack.enter_context(Progresses(study, shown=main_process))
            run_study(
                study,
                data,
                run_isolated if isolated else run_here,
                save=folder.save if folder else lambda study: None,
                watch=progress.watch,
            )
            if folder:
                _conclude(study, folder, args.command_line)
    except OSError as error:
        raise CliError(f"results cannot be written: {error}", exit_code=1) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    if study.state == "interrupted":
        return 130
    return 1 if study.failed() else 0


def _invalid_is_cli_error(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise CliError.of(error) from error


def _announce(study: Study, folder: Path, moved: Path | None) -> None:
    config = study.config
    if moved is not None:
        print(f"earlier results moved to {moved}")
    tasks = ", ".join(f"{task.name} ({task.steps} steps)" for task in study.tasks())
    count = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    print(f"preset {config.preset}: {tasks}, {count}; results go to {folder}")
    if study.runs:
        print(f"{len(study.runs)} finished runs are in {folder} already; --fresh starts over")
    for name, reason in study.skipped.items():
        print(f"SKIPPED {name}: {reason}")
    kernel = study.about.kernels["cpu"]
    if not kernel["loaded"]:
        print(f"NOTE: came8bit runs without its CPU kernels, many times slower: {kernel['reason']}")
    sys.stdout.flush()


def _conclude(study: Study, folder: Folder, command_line: list[str]) -> None:
    """Write and print the report, and draw the picture."""
    from ..tradeoff import plot, report

    text = report.write_report(study, "came8bit " + shlex.join(command_line))
    folder.write("report.md", text)
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        terminal().print(Markdown(text))
    else:
        print("\n" + text)
    files = ["report.md", "results.json", "runs.csv"]
    if any(study.ran(task.name) for task in study.tasks()):
        folder.write("tradeoff.png", plot.draw(study))
        files.insert(0, "tradeoff.png")
    print(f"in {folder.path}: {', '.join(files)}  ({study.seconds / 60:.1f} minutes)")


class Progresses:
    """Shows a study on standard error: bars on a terminal, one line per finished run elsewhere."""

    def __init__(self, study: Study, shown: bool = True) -> None:
        self._study, self._shown = study, shown
        self._bars: Any = None

    def __enter__(self) -> Progresses:
        if self._shown and sys.stderr.isatty():
            from rich import console, progress

            columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
            self._bars = progress.Progress(*columns, console=console.Console(stderr=True))
            self._bars.start()
            self._all, self._run = (self._bars.add_task(what, total=None) for what in ("runs", ""))
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    @contextlib.contextmanager
    def watch(self, spec: RunSpec) -> Iterator[Progress]:
        """Show one run; gives the function to call after each step."""
        study, bars = self._study, self._bars
        what = "" if spec.purpose == "final" else f"({spec.purpose}) "
        name = f"{what}{spec.task.name} {label(spec.optimizer)} lr {spec.lr:g} seed {spec.seed}"

        def show(step: int, loss: float) -> None:
            if bars:
                bars.update(self._run, completed=step, description=f"{name}: {loss:.3f}")

        if bars:
            bars.update(self._all, completed=study.done, total=study.planned)
            bars.reset(self._run, total=spec.task.steps, description=name)
        yield show
        if self._shown:
            line = f"[{study.done + 1}/{study.planned}] {name}: {_outcome(study.runs[-1])}"
            print(line, file=sys.stderr, flush=True) if not bars else bars.console.print(
                line, markup=False, highlight=False
            )


def _outcome(run: RunResult) -> str:
    if run.status != "ok":
        return f"FAILED: {run.error}"
    if run.purpose == "memory" and run.peak_memory is not None:
        return f"peak memory {run.peak_memory / 2**20:.1f} MiB"
    return f"loss {run.loss:.4f}, {run.step_ms['p50']:.0f} ms a step, {run.seconds:.0f} s"
