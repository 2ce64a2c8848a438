"""The picture of ``came8bit estimate``: what each optimizer takes, against the sizes of GPUs."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from ..atomic_file import atomic_file
from ..errors import printable
from .estimate import GIB, Estimate
from .optimizers import OPTIMIZERS
from .report import BNB, Plan, describe, label, title

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
_INK, _FAINT, _FITS = "#222222", "#6f6f6f", "#00795a"
_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": _FAINT,
    "text.color": _INK,
    "text.parse_math": False,  # names may have a $ in them
}
_PAIR, _FULL, _THIN = 1.0, 0.46, 0.24  # from pair to pair, and heights of the two bars


def save(plan: Plan, path: Path) -> None:
    """Draw ``plan`` into the PNG file ``path``.

    Raises:
        ValueError: matplotlib is not installed, or ``path`` does not end in .png.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: expected a name that ends in .png")
    figure = draw(plan)
    with warnings.catch_warnings(), atomic_file(path) as file:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script
        figure.savefig(file, format="png", dpi=140)


def draw(plan: Plan) -> Any:
    """Return the picture as a matplotlib figure, made without a window system."""
    import matplotlib
    from matplotlib.figure import Figure

    chosen = plan.fits[plan.chosen]
    best = chosen.way.estimate if chosen.way else None
    estimates = [*plan.estimates, *plan.released, *([best] if best else [])]
    widest = 1.2 * max(each.peak for each in estimates) / GIB
    start = 0.0 if best is None else 1.25
    height = start + len(plan.estimates) * _PAIR
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says, such as text.usetex
        matplotlib.rcParams.update(_SETTINGS)
        figure: Any = Figure(figsize=(11, 2.1 + 0.46 * height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, widest), ylim=(height - 0.3, -0.5), yticks=[])
        _gpus(axes, plan, widest)
        if best is not None:
            assert chosen.way is not None
            setup = title(chosen.way).replace(", ", ",\n", 1)
            name = f"cheapest for {chosen.gpu:g} GB:\n{setup}"
            _bar(axes, 0, best, _FULL, _FITS)
            _name(axes, 0, name, color=_FITS, weight="bold", fontsize=9)
            axes.axhline(0.68, color=_FAINT, linewidth=0.5)
        for index, each in enumerate(plan.estimates):
            place = start + index * _PAIR
            _bar(axes, place, each, _FULL, _colour(each, chosen.usable))
            theirs = f"\n({BNB})" if OPTIMIZERS[each.optimizer].package == BNB else ""
            _name(axes, place + (0.14 if plan.released else 0), label(each) + theirs)
            if plan.released:
                released = plan.released[index]
                below = place + (_FULL + _THIN) / 2 + 0.02
                _bar(axes, below, released, _THIN, _colour(released, chosen.usable))
        axes.set_xlabel("GiB on the GPU at the moment of the peak")
        figure.suptitle(_title(plan), x=0.01, ha="left", fontsize=12)
        _legend(figure, plan)
    return figure


def _colour(each: Estimate, usable: int) -> str:
    """Return the colour of its number: whether it fits the chosen GPU."""
    return _FITS if each.peak <= usable else _INK


def _gpus(axes: Any, plan: Plan, widest: float) -> None:
    """Draw each GPU as a line, with a band before it that is left free."""
    for index, fit in enumerate(plan.fits):
        if fit.gpu > widest:
            continue
        colour = _FITS if index == plan.chosen else _FAINT
        strong = {"linewidth": 1.6} if index == plan.chosen else {"linewidth": 0.8}
        axes.axvline(fit.gpu, color=colour, zorder=0, **strong)
        axes.axvspan(fit.usable / GIB, fit.gpu, color=colour, alpha=0.13, linewidth=0, zorder=0)
        axes.text(fit.gpu, -0.56, f"{fit.gpu:g}", ha="center", va="bottom", color=colour)
    _name(axes, -0.72, "GPUs, GB", color=_FAINT)


def _bar(axes: Any, place: float, each: Estimate, height: float, colour: str) -> None:
    left = 0.0
    for part, nbytes in each.parts().items():
        width = nbytes / GIB
        axes.barh(place, width, left=left, height=height, color=COLOURS[part], zorder=2)
        left += width
    text = f"{left:.1f}"
    if each.host >= 0.05 * GIB:
        text += f"  + {each.host / GIB:.1f} in host memory"
    thin = height < _FULL
    axes.annotate(
        text,
        (left, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=8 if thin else 10,
        weight="bold" if colour == _FITS else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=3,
    )


def _name(axes: Any, place: float, text: str, **style: Any) -> None:
    axes.text(
        -0.01, place, text, ha="right", va="center", transform=axes.get_yaxis_transform(), **style
    )


def _legend(figure: Any, plan: Plan) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=_NAMES.get(p, p)) for p, colour in COLOURS.items()]
    handles.append(Patch(color=_FITS, alpha=0.3, label=f"left free, {plan.reserve / GIB:g} GiB"))
    figure.legend(handles=handles, loc="outside lower left", ncols=8, frameon=False, fontsize=8.5)


def _title(plan: Plan) -> str:
    known = plan.estimates[0].activations_known
    name = printable(plan.model.name, 80)
    text = f"Training {name}, {plan.model.numel / 1e9:.2f} billion parameters"
    setting = describe(plan.setup) + ("" if known else "; activations are NOT counted")
    if plan.released:
        setting += ". Thin bars: the same with a step in backward"
    return f"{text}\n{setting}. Green: fits {plan.fits[plan.chosen].gpu:g} GB"
