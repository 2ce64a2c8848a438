"""The picture: loss against bytes of state, noise, loss while training, time and memory."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .config import OPTIMIZERS, OptimizerSpec, TaskConfig, label
from .models import MODELS
from .report import comparisons, losses_by_seed, paired, seeds_in_words
from .study import Study

_INK, _FAINT, _GRID = "#222222", "#6f6f6f", "#e6e6e6"
_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "text.parse_math": False,
}


def draw(study: Study) -> bytes:
    """Return the picture as a PNG: one block of panels per task with finished runs."""
    tasks = [task for task in study.tasks() if study.ran(task.name)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says, such as text.usetex
        matplotlib.rcParams.update(_SETTINGS)
        # Figure without pyplot: no window system is asked for, and nothing global is left behind.
        figure: Any = Figure(figsize=(15.5, 8.4 * len(tasks)), layout="constrained")
        blocks = figure.subfigures(len(tasks), 1, squeeze=False, hspace=0.04)
        for block, task in zip(blocks[:, 0], tasks, strict=True):
            _headline(block, study, task)
            grid = block.add_gridspec(2, 3, width_ratios=(2.1, 1, 1))
            _trade(block.add_subplot(grid[:, 0]), study, task)
            if len(study.ran(task.name)) > 1:
                _differences(block.add_subplot(grid[0, 1]), study, task)
                _curves(block.add_subplot(grid[0, 2]), study, task)
            else:
                _curves(block.add_subplot(grid[0, 1:]), study, task)
            _times(block.add_subplot(grid[1, 1]), study, task)
            _memory(block.add_subplot(grid[1, 2]), study, task)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def _headline(block: Any, study: Study, task: TaskConfig) -> None:
    title = "What each byte of optimizer state buys"
    if study.state != "complete":
        title += f" (partial: {study.done} of {study.planned} runs)"
    # The empty lines are the room for the subtitle, which suptitle has no notion of.
    block.suptitle(
        title + "\n\n", x=0.01, ha="left", fontsize=16, fontweight="bold", linespacing=1.3
    )
    text = block.text(
        0.01, 0.955, subtitle(study, task), ha="left", va="top", fontsize=10.5, color=_FAINT
    )
    text.set_in_layout(False)


def subtitle(study: Study, task: TaskConfig) -> str:
    """Say in two lines which model, data, steps and seeds a block of panels shows."""
    runs = [study.final(task.name, name) for name in study.ran(task.name)]
    hardware, device = study.about.hardware, study.about.device
    machine = hardware["gpus"][0]["name"] if device == "cuda" else hardware["cpu"]
    return (
        f"{MODELS[task.model].describe(task)}, {runs[0][0].parameters / 1e6:.2f} M parameters, "
        f"trained on {study.about.data[task.name]['source']}\n{task.steps} steps of {task.batch}; "
        f"{seeds_in_words([len(r) for r in runs])}; each optimizer at its own learning rate; "
        f"{device}: {machine}"
    )


class _Point(NamedTuple):
    """One optimizer in the main panel, by the losses that its seeds would have at the mean seed.

    Most of the spread over seeds is common to all optimizers. So each loss is the first optimizer's
    mean and the difference from its loss of the same seed; ``equal`` is the mean of such losses at
    the common learning rate.
    """

    name: str
    size: float
    losses: list[float]
    equal: float | None
    note: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def _points(study: Study, task: TaskConfig) -> list[_Point]:
    """Return the optimizers from many bytes to few."""
    names, equal_lr = study.ran(task.name), study.equal_lr(task.name)
    level = losses_by_seed(study, task.name, names[0])
    middle = statistics.fmean(level.values())

    def adjusted(name: str, lr: float | None = None) -> list[float]:
        losses = losses_by_seed(study, task.name, name, lr)
        return [middle + losses[s] - level[s] for s in losses if s in level] or [*losses.values()]

    points = []
    for name in names:
        runs = study.final(task.name, name)
        losses = adjusted(name)
        other = adjusted(name, equal_lr) if equal_lr and equal_lr != runs[0].lr else []
        size = statistics.fmean(run.bytes_per_parameter or 0.0 for run in runs)
        note = f"; {seeds_in_words([len(losses)])}" if len(losses) < len(level) else ""
        points.append(_Point(name, size, losses, statistics.fmean(other) if other else None, note))
    return sorted(points, key=lambda point: -point.size)


def _trade(axes: Any, study: Study, task: TaskConfig) -> None:
    """Loss after training against measured bytes: mean, standard deviation, and every seed."""
    points = _points(study, task)
    sizes = [point.size for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xlim(max(10.0, 1.25 * max(sizes)), min(0.2, *sizes, 0.2) / 1.4)
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(-8, 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    ends = [loss for point in points for loss in point.losses]
    bottom, top = min(ends), max(ends)
    room = max(top - bottom, 0.02)
    # Losses at the common learning rate may be far off: they stretch the axis at most to double.
    others = [point.equal for point in points if point.equal is not None]
    bottom = max(min(bottom, *others, bottom), bottom - room / 2)
    top = min(max(top, *others, top), top + room / 2)
    axes.set_ylim(bottom - 0.12 * room, top + 0.12 * room)
    for rule in {OPTIMIZERS[point.name].rule for point in points} - {""}:
        members = [point for point in points if OPTIMIZERS[point.name].rule == rule]
        axes.plot(
            [point.size for point in members],
            [point.mean for point in members],
            color=OPTIMIZERS[members[0].name].colour,
            lw=1.2,
            alpha=0.5,
            zorder=2,
        )
    for point in points:
        spec = OPTIMIZERS[point.name]
        axes.errorbar(
            point.size,
            point.mean,
            yerr=point.deviation or None,
            fmt=spec.marker,
            markersize=17 if spec.marker == "*" else 10,
            color=spec.colour,
            mec="white",
            mew=0.8,
            capsize=4,
            elinewidth=1.2,
            zorder=3,
        )
        seeds = point.losses if point.deviation else []
        axes.plot([point.size] * len(seeds), seeds, "_", color=spec.colour, alpha=0.6, ms=12)
        if point.equal is not None:
            _equal(axes, point.size, point.mean, point.equal, spec)
    first = OPTIMIZERS[study.ran(task.name)[0]].label
    notes = [f"bars, dashes: standard deviation and seeds, as differences from {first}"]
    if others:
        notes.append(f"hollow: at lr {study.equal_lr(task.name):g}")
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.set_xlabel(
        "optimizer state, measured bytes per parameter (log scale; fewer →)\n" + "; ".join(notes)
    )
    axes.set_ylabel(f"validation loss, {MODELS[task.model].unit} (↓ better)")
    axes.set_title(f"{task.name.capitalize()}: loss against bytes")
    _place_labels(axes, points)


def _equal(axes: Any, size: float, own: float, loss: float, spec: OptimizerSpec) -> None:
    """Draw the loss at the common learning rate; outside the panel, an arrow with the number."""
    bottom, top = axes.get_ylim()
    shown = min(max(loss, bottom), top)
    axes.plot([size] * 2, [own, shown], ":", color=spec.colour, lw=1, zorder=2)
    if shown == loss:
        axes.plot(size, loss, spec.marker, mfc="white", mec=spec.colour, markersize=9, zorder=3)
        return
    axes.annotate(
        f"{'↑' if loss > top else '↓'} {loss:.2f}",
        (size, shown),
        xytext=(4, -10 if loss > top else 4),
        textcoords="offset points",
        fontsize=9,
        color=spec.colour,
    )


def _place_labels(axes: Any, points: Sequence[_Point]) -> None:
    """Name the points to their right; labels that would overlap are pushed apart."""
    corners = [axes.transScale.transform((point.size, point.mean)) for point in points]
    spots = axes.transLimits.transform(corners)
    places = spots + np.array([0.025, 0.0])
    for _ in range(200):
        for i in range(len(places)):
            for j in range(i):
                apart = places[i] - places[j]
                overlap = 0.062 - abs(apart[1])  # two lines of text, as a fraction of the panel
                if abs(apart[0]) < 0.2 and overlap > 0:
                    push = overlap / 2 * (1 if apart[1] >= 0 else -1)
                    places[i, 1] += push
                    places[j, 1] -= push
        places[:, 1] = places[:, 1].clip(0.03, 0.97)
    for point, spot, place in zip(points, spots, places, strict=True):
        spec = OPTIMIZERS[point.name]
        axes.annotate(
            f"{spec.label}\n{point.size:.2f} B, {point.mean:.3f}{point.note}",
            xy=spot + np.array([0.008, 0.0]),
            xytext=place,
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            fontweight="bold" if spec.path.startswith("came8bit") else "normal",
            color=spec.colour,
            linespacing=1.15,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
            arrowprops={"arrowstyle": "-", "color": spec.colour, "lw": 0.7, "alpha": 0.6},
        )


def _differences(axes: Any, study: Study, task: TaskConfig) -> None:
    """Differences at equal seeds with their intervals: what lies inside the noise."""
    names, margin = study.ran(task.name), study.config.margin
    pairs = comparisons(names)[::-1]
    shown = 0.0
    for place, (first, second) in enumerate(pairs):
        one, other = (losses_by_seed(study, task.name, name) for name in (first, second))
        result = paired(one, other, margin)
        if result is None:
            continue
        colour = OPTIMIZERS[first].colour
        by_seed = [one[seed] - other[seed] for seed in one if seed in other]
        if result.low is not None:
            axes.plot([result.low, result.high], [place, place], color=colour, lw=2.4, alpha=0.75)
        axes.plot(by_seed, [place + 0.22] * len(by_seed), ".", color=colour, alpha=0.6, ms=5)
        filled = colour if result.outside_noise else "white"
        axes.plot(result.difference, place, "o", mfc=filled, mec=colour, mew=1.6, markersize=7)
        shown = max(shown, *map(abs, by_seed))
    axes.axvspan(-margin, margin, color=_GRID, zorder=0)
    axes.axvline(0, color=_INK, lw=1)
    axes.set_xlim(-2.2 * shown or -margin, 2.2 * shown or margin)  # wide intervals run out of sight
    axes.set_yticks(
        range(len(pairs)),
        [
            label(first) if second == names[0] else f"{label(first)}\n− {label(second)}"
            for first, second in pairs
        ],
        fontsize=9 if len(pairs) < 9 else 7.5,
    )
    axes.set_ylim(-0.6, max(len(pairs), 3) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(
        "loss difference at equal seeds, 95 % t interval\n"
        f"(hollow: inside the noise; grey: ± {margin:g})"
    )
    axes.set_title(f"Minus {label(names[0])}")


def _curves(axes: Any, study: Study, task: TaskConfig) -> None:
    """Training loss, averaged over seeds and smoothed; the batches are the same for all."""
    window = max(1, task.steps // 20)
    tail: list[float] = []
    for name in study.ran(task.name):
        spec = OPTIMIZERS[name]
        runs = [run.train_losses for run in study.final(task.name, name)]
        smooth = np.convolve(np.mean(runs, axis=0), np.full(window, 1 / window), "valid")
        axes.plot(
            range(window, window + len(smooth)),
            smooth,
            color=spec.colour,
            linewidth=1.5,
            linestyle={"*": "--", "s": "--", "p": ":", "h": "-."}.get(spec.marker, "-"),
            label=spec.label,
        )
        tail += smooth[len(smooth) // 6 :].tolist()
    if max(tail) > min(tail):
        # The first fall is alike for all and would flatten the rest.
        axes.set_ylim(min(tail) - 0.05 * (max(tail) - min(tail)), max(tail))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_xlabel(f"step (mean over the last {window})")
    axes.set_ylabel("training loss")
    axes.set_title("Loss while training")
    few = len(study.ran(task.name)) < 7
    axes.legend(frameon=False, fontsize=9 if few else 7.5, loc="upper right")


def _times(axes: Any, study: Study, task: TaskConfig) -> None:
    """Median time of ``optimizer.step()``, and its share of a whole training step."""
    rows = []
    for name in study.ran(task.name)[::-1]:
        runs = study.final(task.name, name)
        low, median, high = (
            statistics.fmean(run.optimizer_ms[q] for run in runs) for q in ("p20", "p50", "p80")
        )
        share = 100 * median / statistics.fmean(run.step_ms["p50"] for run in runs)
        rows.append((name, median, f"{median:.3g} ms ({share:.{share < 9.5:d}f} %)", (low, high)))
    _bars(axes, rows)
    axes.set_xlabel("optimizer.step(), ms: median, p20 to p80\n(share of the whole training step)")
    axes.set_title("Time of an update")


def _memory(axes: Any, study: Study, task: TaskConfig) -> None:
    """Peak memory above the level before the model was built; a span if there are several."""
    rows = []
    for name in study.ran(task.name)[::-1]:
        peaks = [peak / 2**20 for peak in study.peak_memory(task.name, name)]
        if peaks:
            middle = statistics.fmean(peaks)
            rows.append((name, middle, f"{middle:.0f} MiB", (min(peaks), max(peaks))))
    axes.set_title("Peak memory of training")
    if not rows:
        axes.text(0.5, 0.5, "not measured on this system", ha="center", transform=axes.transAxes)
        return
    _bars(axes, rows)
    axes.set_xlabel("MiB: weights, gradients, activations,\nstate and temporaries")


def _bars(axes: Any, rows: Sequence[tuple[str, float, str, tuple[float, float]]]) -> None:
    """Draw named bars with a text and a span (low, high) each; few bars do not grow."""
    for place, (name, value, text, (low, high)) in enumerate(rows):
        axes.barh(place, value, color=OPTIMIZERS[name].colour, height=0.6, zorder=2)
        axes.plot([low, high], [place, place], color=_INK, lw=1.2, zorder=3)
        axes.annotate(
            text,
            (max(value, high), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [label(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.5 - max(len(rows), 3), len(rows) - 0.5)
    axes.tick_params(axis="y", length=0)
    longest = max(max(row[1], row[3][1]) for row in rows)
    axes.set_xlim(0, 1.55 * longest or 1.0)  # 0: a process that already had all the memory
    axes.grid(axis="x", color=_GRID, linewidth=0.8, zorder=0)
