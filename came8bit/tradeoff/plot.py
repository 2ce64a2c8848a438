"""The picture: accuracy against bytes of state, noise, loss while training, time and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from .config import TaskConfig, label
from .models import describe
from .report import UNITS, comparisons, deviation, losses_by_seed, mean, paired
from .study import Study

# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers that stay apart in
# print.
STYLE = {
    "adamw": ("#4d4d4d", "o"),
    "adamw8bit": ("#d08c00", "s"),
    "came-pytorch": ("#3fa0d8", "^"),
    "came": ("#0060a0", "D"),
    "came8bit": ("#d55e00", "*"),
}
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
}


def draw(study: Study) -> bytes:
    """Return the picture as a PNG: one block of five panels per task with finished runs."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks = [task for task in study.config.tasks if study.final(task.kind)]
    with matplotlib.rc_context(_SETTINGS):
        # Figure without pyplot: no window system is asked for, and nothing global is left behind.
        figure: Any = Figure(figsize=(15.5, 8.4 * len(tasks)), layout="constrained")
        blocks = figure.subfigures(len(tasks), 1, squeeze=False, hspace=0.04)
        for block, task in zip(blocks[:, 0], tasks, strict=True):
            _headline(block, study, task)
            grid = block.add_gridspec(2, 3, width_ratios=(2.1, 1, 1))
            _trade(block.add_subplot(grid[:, 0]), study, task)
            _differences(block.add_subplot(grid[0, 1]), study, task)
            _curves(block.add_subplot(grid[0, 2]), study, task)
            _times(block.add_subplot(grid[1, 1]), study, task)
            _memory(block.add_subplot(grid[1, 2]), study, task)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def _headline(block: Any, study: Study, task: TaskConfig) -> None:
    partial = f" (partial: {len(study.runs)} of {study.planned} runs)"
    title = "What each byte of optimizer state buys" + (
        partial if study.state != "complete" else ""
    )
    # The empty lines are the room for the subtitle, which suptitle has no notion of.
    block.suptitle(
        title + "\n\n", x=0.01, ha="left", fontsize=16, fontweight="bold", linespacing=1.3
    )
    subtitle_text = block.text(
        0.01, 0.955, subtitle(study, task), ha="left", va="top", fontsize=10.5, color=_FAINT
    )
    subtitle_text.set_in_layout(False)


def subtitle(study: Study, task: TaskConfig) -> str:
    """Say in two lines which model, data, steps and seeds a block of panels shows."""
    runs = study.final(task.kind)
    items = f"{task.batch_size * task.accumulate}"
    items += f" × {task.context} bytes" if task.context else " images"
    counts = sorted({len(study.final(task.kind, name)) for name in study.ran(task.kind)})
    seeds = " or ".join(map(str, counts)) + (" seeds" if counts != [1] else " seed")
    hardware = study.about["hardware"]
    machine = hardware["gpus"][0]["name"] if runs[0].device == "cuda" else hardware["cpu"]
    return (
        f"{describe(task)}, {runs[0].parameters / 1e6:.2f} M parameters, trained on "
        f"{study.about['data'][task.kind]['source']}\n{task.steps} steps of {items}; {seeds}; each "
        f"optimizer at its own learning rate; {runs[0].device}: {machine}"
    )


class _Point(NamedTuple):
    """One optimizer in the main panel; ``place`` is where it is drawn, at or near ``size``."""

    name: str
    size: float
    losses: list[float]
    place: float
    note: str


def _trade(axes: Any, study: Study, task: TaskConfig) -> None:
    """Loss after training against measured bytes: mean, standard deviation, and every seed."""
    from matplotlib.ticker import FixedLocator, NullLocator

    points = _points(study, task)
    for point in points:
        colour, marker = STYLE[point.name]
        axes.errorbar(
            point.place,
            mean(point.losses),
            yerr=deviation(point.losses),
            fmt=marker,
            markersize=17 if marker == "*" else 9,
            color=colour,
            capsize=4,
            elinewidth=1.4,
            zorder=3,
        )
        # Beside the mean, not under it.
        beside = [point.place * 1.045] * len(point.losses)
        axes.plot(beside, point.losses, ".", color=colour, alpha=0.55, markersize=6, zorder=3)
    sizes = [point.size for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.8)  # on the right, room for the last label
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    extremes = [loss for point in points for loss in point.losses]
    for point in points:
        spread = deviation(point.losses) or 0.0
        extremes += [mean(point.losses) - spread, mean(point.losses) + spread]
    room = max(max(extremes) - min(extremes), 1e-3)
    axes.set_ylim(min(extremes) - 0.16 * room, max(extremes) + 0.1 * room)
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer state, measured bytes per parameter (log scale)")
    axes.set_ylabel(f"validation loss, {UNITS[task.kind]}")
    axes.set_title(f"{task.kind.capitalize()}: accuracy against bytes")
    axes.annotate(
        "better: lower loss,\nfewer bytes",
        xy=(0.015, 0.02),
        xytext=(0.085, 0.062),
        xycoords="axes fraction",
        fontsize=9,
        color=_FAINT,
        va="center",
        arrowprops={"arrowstyle": "-|>", "color": _FAINT, "lw": 1.2},
    )
    axes.text(
        0.985,
        0.02,
        "bars: ± 1 standard deviation over seeds; dots: seeds\n(runs of one seed share weights and "
        "batches: see right)",
        transform=axes.transAxes,
        ha="right",
        fontsize=8.5,
        color=_FAINT,
    ).set_in_layout(False)
    _place_labels(axes, points)


def _points(study: Study, task: TaskConfig) -> list[_Point]:
    """Return the optimizers from few bytes to many; equal ones stand side by side."""
    names = study.ran(task.kind)
    most = max(len(study.final(task.kind, name)) for name in names)
    points: list[_Point] = []
    for name in names:
        runs = study.final(task.kind, name)
        losses = [run.loss for run in runs if run.loss is not None]
        size = mean([run.bytes_per_parameter or 0.0 for run in runs])
        note = f"\nonly {len(losses)} of {most} seeds" if len(losses) < most else ""
        points.append(_Point(name, size, losses, size, note))
    points.sort(key=lambda point: point.size)
    for i in range(1, len(points)):
        if points[i].size < 1.05 * points[i - 1].size:
            points[i] = points[i]._replace(place=points[i - 1].place * 1.09)
    return points


def _place_labels(axes: Any, points: Sequence[_Point]) -> None:
    """Name the points to the right of each group; labels of a group are pushed apart."""
    bottom, top = axes.get_ylim()
    gap = 0.075 * (top - bottom)  # two lines of text, in data units
    groups: list[list[_Point]] = []
    for point in points:
        if groups and point.place / groups[-1][-1].place < 1.2:
            groups[-1].append(point)
        else:
            groups.append([point])
    for group in groups:
        at = max(point.place for point in group) * 1.12
        group.sort(key=lambda point: mean(point.losses))
        heights = [mean(point.losses) for point in group]
        for _ in range(100):  # neighbours that are too close move apart by equal amounts
            for i in range(len(heights) - 1):
                overlap = gap - (heights[i + 1] - heights[i])
                if overlap > 0:
                    heights[i] -= overlap / 2
                    heights[i + 1] += overlap / 2
        for point, height in zip(group, heights, strict=True):
            colour = STYLE[point.name][0]
            axes.annotate(
                f"{label(point.name)}\n{point.size:.2f} B, {mean(point.losses):.3f}{point.note}",
                xy=(point.place * 1.03, mean(point.losses)),
                xytext=(at, height),
                va="center",
                fontsize=9.5,
                fontweight="bold" if point.name == "came8bit" else "normal",
                color=colour,
                linespacing=1.2,
                zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.0},
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.6},
            )


def _differences(axes: Any, study: Study, task: TaskConfig) -> None:
    """Differences at equal seeds with their intervals: what lies inside the noise."""
    pairs = comparisons(study.ran(task.kind))[::-1]
    losses = losses_by_seed(study, task.kind)
    for place, (first, second) in enumerate(pairs):
        result = paired(losses[first], losses[second])
        if result is None:
            continue
        colour = STYLE[second][0]
        by_seed = [
            losses[first][s] - losses[second][s] for s in losses[first] if s in losses[second]
        ]
        if result.low is not None:
            axes.plot([result.low, result.high], [place, place], color=colour, lw=2.4, alpha=0.75)
        axes.plot(by_seed, [place + 0.2] * len(by_seed), ".", color=colour, alpha=0.6, markersize=5)
        filled = colour if result.outside_noise else "white"
        axes.plot(result.difference, place, "o", mfc=filled, mec=colour, mew=1.6, markersize=8)
    axes.axvline(0, color=_INK, lw=1)
    names = [
        f"− {label(second)}" if first == "came8bit" else f"{label(first)}\n− {label(second)}"
        for first, second in pairs
    ]
    axes.set_yticks(range(len(pairs)), names)
    axes.set_ylim(-0.6, len(pairs) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("loss difference at equal seeds, 95 % t interval\n(hollow: inside the noise)")
    axes.set_title("CAME8bit minus …" if any(p[0] == "came8bit" for p in pairs) else "Differences")


def _curves(axes: Any, study: Study, task: TaskConfig) -> None:
    """Training loss, averaged over seeds and smoothed; the batches are the same for all."""
    window = max(1, task.steps // 20)
    tail = []
    for name in study.ran(task.kind):
        runs = [run.train_losses for run in study.final(task.kind, name)]
        averaged = [mean(at_step) for at_step in zip(*runs, strict=True)]
        smooth = [mean(averaged[i - window + 1 : i + 1]) for i in range(window - 1, len(averaged))]
        axes.plot(
            range(window, len(averaged) + 1),
            smooth,
            color=STYLE[name][0],
            linewidth=1.6,
            linestyle="--" if name in ("came8bit", "adamw8bit") else "-",
            label=label(name),
        )
        tail += smooth[len(smooth) // 6 :]
    if tail and max(tail) > min(tail):
        # The first fall is alike for all and would flatten the rest.
        axes.set_ylim(min(tail) - 0.05 * (max(tail) - min(tail)), max(tail))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_xlabel(f"step (mean over seeds and the last {window} steps)")
    axes.set_ylabel("training loss")
    axes.set_title("Loss while training")
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _times(axes: Any, study: Study, task: TaskConfig) -> None:
    """Median time of ``optimizer.step()``, and its share of a whole training step."""
    rows = []
    for name in study.ran(task.kind)[::-1]:
        runs = study.final(task.kind, name)
        low, median, high = (
            mean([run.optimizer_ms[q] for run in runs]) for q in ("p20", "p50", "p80")
        )
        whole = mean([run.step_ms["p50"] for run in runs])
        rows.append((name, median, f"{median:.3g} ms ({100 * median / whole:.2g} %)", (low, high)))
    _bars(axes, rows)
    axes.set_xlabel("optimizer.step(), ms: median, p20 to p80\n(share of the whole training step)")
    axes.set_title("Time of an update")


def _memory(axes: Any, study: Study, task: TaskConfig) -> None:
    """Peak memory above the level before the model was built; a span if there are several."""
    rows = []
    for name in study.ran(task.kind)[::-1]:
        peaks = [peak / 2**20 for peak in study.peak_memory(task.kind, name)]
        if peaks:
            rows.append((name, mean(peaks), f"{mean(peaks):.0f} MiB", (min(peaks), max(peaks))))
    axes.set_title("Peak memory of training")
    if not rows:
        axes.text(0.5, 0.5, "not measured on this system", ha="center", transform=axes.transAxes)
        return
    _bars(axes, rows)
    axes.set_xlabel("MiB above the start: weights, gradients,\nactivations, state and temporaries")


def _bars(axes: Any, rows: Sequence[tuple[str, float, str, tuple[float, float]]]) -> None:
    """Draw named bars with a text and a span (low, high) each."""
    for place, (name, value, text, (low, high)) in enumerate(rows):
        axes.barh(place, value, color=STYLE[name][0], height=0.6, zorder=2)
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
    axes.tick_params(axis="y", length=0)
    longest = max(max(row[1], row[3][1]) for row in rows)
    axes.set_xlim(0, 1.55 * longest or 1.0)  # 0: a process that already had all the memory
    axes.grid(axis="x", color=_GRID, linewidth=0.8, zorder=0)
