"""The command line of ``came8bit tradeoff``."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import environment
from ..errors import CliError
from ..tradeoff import plot, report, results
from ..tradeoff.config import ALL_OPTIMIZERS, PRESETS, StudyConfig, check_names, preset_config
from ..tradeoff.data import (
    CORPORA,
    Data,
    eval_items,
    load_images,
    load_text,
    train_items,
)
from ..tradeoff.study import ProgressBars, Study, available, run_study
from ..tradeoff.train import distributed, run_here, run_isolated

# Arguments that change the field of the same name in every task.
_CHANGES = (
    *("steps", "batch_size", "accumulate", "layers", "width", "heads", "warmup_steps"),
    *("schedule", "eval_items", "eval_every", "weight_decay"),
)
_NEEDED = ("accelerate", "transformers", "matplotlib", "tqdm")


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "tradeoff",
        help="train with several optimizers; compare loss, bytes of state, memory and time",
        description="Train the same model from the same seeds on real data with each optimizer, "
        "and compare validation loss, bytes of optimizer state per parameter, peak memory and "
        "step time.",
        epilog="presets: "
        + "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
        + ". Ctrl-C keeps and reports the runs that are finished.",
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="quick", help="default: %(default)s")
    add(
        "--optimizers",
        metavar="NAME,...",
        default=",".join(ALL_OPTIMIZERS),
        help="from: %(default)s (the default)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: results/tradeoff-PRESET-DATE-TIME; results it already holds are moved into "
        "a folder inside it",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--tasks", metavar="KIND,...", help="text, vision (default: the preset's)")
    data.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="train on these files")
    data.add_argument(
        "--corpus",
        choices=CORPORA,
        default="stdlib",
        help="text to train on without --text; stdlib, the default, is the source code of Python's "
        "standard library, the others come from `make data`",
    )
    data.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="where `make data` put them"
    )

    training = parser.add_argument_group("training (the preset decides what is not given)")
    training.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds")
    training.add_argument(
        "--slow-seeds", type=_positive, metavar="N", help="for what is slow on a CPU"
    )
    training.add_argument("--steps", type=_positive, metavar="N")
    training.add_argument("--batch-size", type=_positive, metavar="N")
    training.add_argument(
        "--accumulate", type=_positive, metavar="N", help="backward passes per step"
    )
    training.add_argument("--layers", type=_positive, metavar="N")
    training.add_argument("--width", type=_positive, metavar="N")
    training.add_argument("--heads", type=_positive, metavar="N")
    training.add_argument("--context", type=_positive, metavar="N", help="bytes per window of text")
    training.add_argument("--warmup-steps", type=_natural, metavar="N")
    training.add_argument("--schedule", choices=("cosine", "constant"))
    training.add_argument("--eval-items", type=_positive, metavar="N", help="windows or images")
    training.add_argument("--eval-every", type=_natural, metavar="N", help="0: at the end only")
    training.add_argument("--weight-decay", type=float, metavar="X")
    training.add_argument("--mixed-precision", choices=("no", "bf16"))

    rates = parser.add_argument_group("learning rates")
    rates.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="search each optimizer's learning rate on a split of its own first",
    )
    rates.add_argument(
        "--lr", action="append", default=[], metavar="NAME=LR", help="use this one, for every task"
    )
    rates.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=LR,...",
        help="search these, for every task",
    )

    where = parser.add_argument_group("where it runs")
    where.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    where.add_argument(
        "--in-process",
        action="store_true",
        help="do not give each run a process of its own (peak memory is then less certain)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the study; returns 0, 1 if a run failed, or 130 if it was interrupted."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CliError(f"needs {', '.join(missing)}: pip install 'came8bit[cli]'")
    config = study_config(args)
    on_cpu = config.cpu or not torch.cuda.is_available()
    main_process = int(os.environ.get("RANK", "0")) == 0
    isolated = not (args.in_process or distributed())

    study = Study(config)
    usable, study.skipped = available(config)
    if not usable:
        raise CliError(
            "none of the optimizers is installed: " + _listed(study.skipped), exit_code=1
        )
    data = _load(args, study)
    study.about = {
        "data": {kind: loaded.about for kind, loaded in data.items()},
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "kernels": environment.kernels(),
        "git": environment.git_revision(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "isolated": isolated,
    }
    folder = args.out or _default_folder(config.preset)
    if main_process:
        earlier = results.prepare_folder(folder)
        _announce(study, folder, earlier)

    def save(current: Study) -> None:
        if main_process:
            results.save(current, folder)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill keeps results, too
    try:
        with ProgressBars(study, shown=main_process) as bars:
            run_study(
                study,
                data,
                run_isolated if isolated else run_here,
                on_cpu=on_cpu,
                isolated=isolated,
                save=save,
                watch=bars.watch,
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    if main_process:
        _conclude(study, folder, args.command_line)
    if study.state == "interrupted":
        return 130
    return 1 if study.failed() else 0


def study_config(args: argparse.Namespace) -> StudyConfig:
    """Return the preset's study, changed by the arguments.

    Raises:
        CliError: If an argument names something unknown or does not fit.
    """
    config = preset_config(args.preset)
    optimizers = check_names([name for name in args.optimizers.split(",") if name])
    if not optimizers:
        raise CliError(f"--optimizers: got none, expected some of {', '.join(ALL_OPTIMIZERS)}")
    tasks = config.tasks
    if args.tasks:
        kinds = {task.kind: task for task in PRESETS["standard"].tasks}
        kinds |= {task.kind: task for task in tasks}
        wanted = list(dict.fromkeys(kind for kind in args.tasks.split(",") if kind))
        unknown = [kind for kind in wanted if kind not in kinds]
        if unknown or not wanted:
            raise CliError(f"--tasks: got {args.tasks!r}, expected some of {', '.join(kinds)}")
        tasks = tuple(kinds[kind] for kind in wanted)
    changes = {name: getattr(args, name) for name in _CHANGES if getattr(args, name) is not None}
    tasks = tuple(replace(task, **changes) for task in tasks)
    if args.context is not None:
        tasks = tuple(replace(t, context=args.context) if t.kind == "text" else t for t in tasks)
    for task in tasks:
        if task.width % task.heads:
            raise CliError(f"--width {task.width} is not a multiple of --heads {task.heads}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for task in tasks:
        if task.batch_size % processes:
            raise CliError(
                f"--batch-size {task.batch_size} cannot be shared by {processes} processes"
            )

    tune = config.tune if args.tune is None else args.tune
    grids = {kind: dict(grid) for kind, grid in config.grids.items()}
    for name, values in _assignments("--grid", args.grid):
        for kind in grids:
            grids[kind][name] = values
    rates = {kind: dict(lrs) for kind, lrs in config.learning_rates.items()}
    for name, values in _assignments("--lr", args.lr):
        for task in tasks:
            rates.setdefault(task.kind, {})[name] = values[0]
            grids[task.kind][name] = values[:1]
    if not tune:
        for task in tasks:
            without = [name for name in optimizers if name not in rates.get(task.kind, {})]
            if without:
                raise CliError(
                    f"preset {args.preset} has no learning rate on {task.kind} for "
                    f"{', '.join(without)}: add --tune, or --lr {without[0]}=LR"
                )
    seeds = tuple(range(args.seeds)) if args.seeds else config.seeds
    slow = args.slow_seeds or (args.seeds if args.seeds else config.slow_seeds)
    return replace(
        config,
        tasks=tasks,
        optimizers=optimizers,
        seeds=seeds,
        slow_seeds=min(slow, len(seeds)),
        learning_rates=rates,
        grids=grids,
        tune=tune,
        mixed_precision=args.mixed_precision or config.mixed_precision,
        cpu=args.cpu,
    )


def _load(args: argparse.Namespace, study: Study) -> dict[str, Data]:
    """Load each task's data. A task that only the preset asked for is skipped without it."""
    data: dict[str, Data] = {}
    for task in study.config.tasks:
        try:
            if task.kind == "text":
                data["text"] = load_text(args.text, args.corpus, args.data_dir)
            else:
                data["vision"] = load_images(args.data_dir)
        except CliError as error:
            if task.kind == "text" or args.tasks:
                raise
            study.skipped[task.kind] = str(error)
            continue
        # Data that is too small for the task is found out here, not by the first run.
        for split in ("tune", "validation"):
            eval_items(data[task.kind], task, split)
        train_items(data[task.kind], replace(task, steps=1), seed=0)
    return data


def _announce(study: Study, folder: Path, earlier: Path | None) -> None:
    config = study.config
    if earlier is not None:
        print(f"earlier results moved to {earlier}")
    tasks = ", ".join(f"{task.kind} ({task.steps} steps)" for task in config.tasks)
    print(f"preset {config.preset}: {tasks}, {len(config.seeds)} seeds; results go to {folder}")
    for name, reason in study.skipped.items():
        print(f"SKIPPED {name}: {reason}")
    kernel = study.about["kernels"]["cpu"]
    if not kernel["loaded"]:
        print(f"NOTE: came8bit runs without its CPU kernels, many times slower: {kernel['reason']}")
    sys.stdout.flush()


def _conclude(study: Study, folder: Path, command_line: list[str]) -> None:
    """Write and print the report, and draw the picture."""
    text = report.write_report(study, "came8bit " + shlex.join(command_line))
    results.write_atomically(folder / "report.md", text)
    print("\n" + text)
    files = ["report.md", "results.json", "runs.csv"]
    if any(run.purpose == "final" and run.status == "ok" for run in study.runs):
        results.write_atomically(folder / "tradeoff.png", plot.draw(study))
        files.insert(0, "tradeoff.png")
    print(f"in {folder}: {', '.join(files)}  ({study.seconds / 60:.1f} minutes)")


def _default_folder(preset: str) -> Path:
    return Path("results") / f"tradeoff-{preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _assignments(option: str, texts: Iterable[str]) -> Iterable[tuple[str, tuple[float, ...]]]:
    for text in texts:
        name, _, values = text.partition("=")
        check_names([name])
        try:
            numbers = tuple(float(value) for value in values.split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) <= 0:
            raise CliError(f"{option} {text}: expected NAME=NUMBER, for example {name}=2e-4")
        yield name, numbers


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


# argparse names the function in its message: "invalid positive number value: '0'".
_natural.__name__, _positive.__name__ = "whole number", "positive number"
