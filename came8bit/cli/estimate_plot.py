"""The picture of ``came8bit estimate``: a stacked bar per optimizer, and the cards as lines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from came8bit import planner
from came8bit.errors import CliError
from came8bit.planner.report import Plan, describe, label

# Colours that stay apart for colour-blind readers (after Okabe and Ito).
COLOURS = {
    "parameters": "#4d4d4d",
    "state": "#d55e00",
    "staging": "#f0a868",
    "gradients": "#0060a0",
    "activations": "#3fa0d8",
    "logits": "#a8d8f0",
    "step": "#cc79a7",
}
_NAMES = {"staging": "staging of pages", "logits": "logits and loss", "step": "temporaries of step"}
_INK, _FAINT = "#222222", "#6f6f6f"
_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "text.color": _INK,
}


def save(plan: Plan, path: Path) -> None:
    """Draw ``plan`` into the PNG file ``path``.

    Raises:
        CliError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CliError("--plot needs matplotlib: pip install matplotlib")
    if path.suffix.lower() != ".png":
        raise CliError(f"--plot {path}: expected a name that ends in .png")
    figure = draw(plan)
    try:
        figure.savefig(path, format="png", dpi=140)
    except OSError as error:
        raise CliError(f"--plot {path}: {error}") from error


def draw(plan: Plan) -> Any:
    """The picture as a matplotlib figure, made without a window system."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = _rows(plan)
    with matplotlib.rc_context(_SETTINGS):
        figure: Any = Figure(figsize=(11, 1.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, estimate, hatch) in enumerate(rows):
            _bar(axes, place, estimate, hatch)
            axes.text(-0.01, place, name, ha="right", va="center", transform=_beside(axes))
        widest = max(estimate.peak for _, estimate, _ in rows) / planner.GIB
        axes.set(xlim=(0, 1.16 * widest), ylim=(len(rows) - 0.4, -0.6), yticks=[])
        for card in plan.cards:
            if card <= 1.16 * widest:
                axes.axvline(card, color=_FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
                axes.text(card, -0.75, f"{card:g}", ha="center", va="bottom", color=_FAINT)
        axes.text(-0.01, -0.75, "cards, GB", ha="right", color=_FAINT, transform=_beside(axes))
        axes.set_xlabel("GiB on the card at the moment of the peak")
        figure.suptitle(_title(plan), x=0.01, ha="left", fontsize=12)
        handles = [Patch(color=colour, label=_NAMES.get(p, p)) for p, colour in COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=7, frameon=False)
    return figure


def _rows(plan: Plan) -> list[tuple[str, planner.Estimate, bool]]:
    """Name, estimate, and whether it is the second bar, stepping in the backward."""
    rows = []
    for index, estimate in enumerate(plan.estimates):
        rows.append((label(estimate), estimate, False))
        if plan.released:
            rows.append(("step in backward", plan.released[index], True))
    return rows


def _bar(axes: Any, place: int, estimate: planner.Estimate, released: bool) -> None:
    left = 0.0
    for part, nbytes in estimate.parts().items():
        width = nbytes / planner.GIB
        axes.barh(place, width, left=left, height=0.78, color=COLOURS[part])
        left += width
    text = f"{left:.1f}"
    if estimate.host >= 0.05 * planner.GIB:
        text += f"  + {estimate.host / planner.GIB:.1f} in host memory"
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(
        text,
        (left, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=_FAINT if released else _INK,
        bbox=behind,
    )


def _beside(axes: Any) -> Any:
    """Coordinates: across in parts of the axes, down in bars."""
    return axes.get_yaxis_transform()


def _title(plan: Plan) -> str:
    known = plan.estimates[0].activations_known
    return (
        f"Training {plan.model.name}, {plan.model.numel / 1e9:.2f} billion parameters\n"
        + describe(plan.setup)
        + ("" if known else "; activations are NOT counted")
    )
