"""The plan of ``came8bit estimate`` as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from came8bit import planner

#: part of the peak -> its letter in the bars and its heading in the table.
PARTS = {
    "parameters": ("P", "param."),
    "state": ("S", "state"),
    "staging": ("T", "staging"),
    "gradients": ("G", "grad."),
    "activations": ("A", "activ."),
    "logits": ("L", "logits"),
    "step": ("W", "step"),
}
_BAR = 56


@dataclass(frozen=True)
class Plan:
    """Everything that is printed.

    Attributes:
        model: what is trained.
        setup: how, as asked.
        estimates: one per optimizer, as asked.
        released: the same, stepping in the backward; empty where that is excluded, or asked anyway.
        cards: sizes in GiB.
        reserve: bytes left free on each.
        ways: with CAME8bit, in the order of effort.
    """

    model: planner.Model
    setup: planner.Setup
    estimates: list[planner.Estimate]
    released: list[planner.Estimate]
    cards: tuple[float, ...]
    reserve: int
    ways: list[planner.Way]

    def usable(self, card: float) -> int:
        """Bytes of a card that the plan may use."""
        return int(card * planner.GIB) - self.reserve


def make_plan(
    model: planner.Model,
    setup: planner.Setup,
    optimizers: Sequence[str],
    cards: tuple[float, ...],
    reserve: int,
    *,
    paged: bool,
) -> Plan:
    """Compute everything; errors as in :func:`planner.estimate`."""
    kinds = [planner.OPTIMIZERS[name] for name in optimizers]
    estimates = [planner.estimate(model, kind, setup) for kind in kinds]
    released = []
    if not setup.release and not setup.accumulation:
        releasing = replace(setup, release=True)
        released = [planner.estimate(model, kind, releasing) for kind in kinds]
    ways = planner.ways(model, setup, paged=paged)
    return Plan(model, setup, estimates, released, cards, reserve, ways)


# --- text -----------------------------------------------------------------------------------------


def as_text(plan: Plan) -> str:
    """The whole report."""
    blocks = [_heading(plan), _table(plan), _bars(plan), _state(plan), _fits(plan)]
    return "\n\n".join([*blocks, *_advice(plan)])


def label(estimate: planner.Estimate) -> str:
    """The optimizer's name."""
    return planner.OPTIMIZERS[estimate.optimizer].label


def describe(setup: planner.Setup) -> str:
    """The setting in a few words."""
    words = [setup.dtype, f"batch {setup.batch} x {setup.sequence} tokens"]
    words += ["activation checkpointing"] if setup.checkpointing else []
    words += ["step in backward"] if setup.release else []
    words += ["gradient accumulation"] if setup.accumulation else []
    words += ["fp32 state for embeddings"] if setup.fp32_embeddings else []
    return ", ".join(words)


def _heading(plan: Plan) -> str:
    model, setup = plan.model, plan.setup
    lines = [
        f"{model.name}: {model.numel:,} parameters in {len(model.parameters)} tensors",
        f"from {model.source}",
        describe(setup),
        "",
        "Parameters, gradients and state are exact. "
        + (
            "Activations and logits are an estimate."
            if setup.activations is None
            else "Activations are the given number."
        ),
    ]
    if not plan.estimates[0].activations_known:
        why = "shapes alone do not tell them. Give the model's config.json, or"
        if model.unknown:
            why = f"the planner does not know the layers of {model.unknown}. Give"
        lines[-1] = (
            "Parameters, gradients and state are exact. ACTIVATIONS ARE NOT COUNTED: "
            f"{why} --activations."
        )
    return "\n".join([*lines, *model.notes])


def _gib(nbytes: float) -> str:
    value = nbytes / planner.GIB
    return "-" if nbytes == 0 else f"{value:.2f}" if value >= 0.005 else "<0.01"


def _table(plan: Plan) -> str:
    heads = [title for _, title in PARTS.values()]
    header = ["GiB", *heads, "PEAK", "host"]
    if plan.released:
        header.append("peak, step in backward")
    rows = [header]
    for index, estimate in enumerate(plan.estimates):
        row = [label(estimate), *map(_gib, estimate.parts().values())]
        row += [_gib(estimate.peak), _gib(estimate.host)]
        if plan.released:
            row.append(_gib(plan.released[index].peak))
        rows.append(row)
    moments = {e.peak_moment.name for e in plan.estimates}
    note = (
        "The columns are what is there at the moment of the peak"
        + (f" ({moments.pop()})" if len(moments) == 1 else ", which differs between optimizers")
        + ". grad.: gradients, all together "
        + f"{_gib(plan.estimates[0].gradients)}. staging: device memory that paged state passes "
        "through. step: temporaries of the step. host: memory outside the card."
    )
    return "\n".join([*_aligned(rows), *textwrap.wrap(note, 99)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _bars(plan: Plan) -> str:
    """A bar per optimizer, a letter per part, on a common scale."""
    pairs = []
    for index, estimate in enumerate(plan.estimates):
        pairs.append((label(estimate), estimate))
        if plan.released:
            pairs.append(("", plan.released[index]))
    scale = max(estimate.peak for _, estimate in pairs)
    width = max(len(name) for name, _ in pairs)
    lines = [", ".join(f"{letter} {part}" for part, (letter, _) in PARTS.items())]
    if plan.released:
        lines[0] += "; second line: step in backward"
    for name, estimate in pairs:
        bar = bar_of(estimate.parts(), scale)
        host = f" + {_gib(estimate.host)} host" if estimate.host >= 0.005 * planner.GIB else ""
        lines.append(f"{name:<{width}} |{bar:<{_BAR}}| {_gib(estimate.peak)}{host}")
    return "\n".join(lines)


def bar_of(parts: dict[str, int], scale: int) -> str:
    """``parts`` as letters, ``_BAR`` of them for ``scale`` bytes.

    Borders are rounded, not lengths, so the bar is as long as the sum says.
    """
    bar, total = "", 0
    for part, nbytes in parts.items():
        total += nbytes
        bar += PARTS[part][0] * (round(_BAR * total / scale) - len(bar))
    return bar


def _state(plan: Plan) -> str:
    rows = [["state, buffer by buffer", "GiB", "bytes/param.", "where"]]
    for estimate in plan.estimates:
        state = estimate.state
        rows.append(
            [label(estimate), _gib(state.nbytes), f"{state.nbytes / plan.model.numel:.4f}", ""]
        )
        for buffers, where in ((state.device, "device"), (state.host, "host")):
            for name, nbytes in buffers.items():
                per = f"{nbytes / plan.model.numel:.4f}"
                rows.append([f"  {name}", _gib(nbytes), per, where])
    return "\n".join(_aligned(rows))


def _fits(plan: Plan) -> str:
    header = [f"fits, with {_gib(plan.reserve)} GiB left free", *(f"{c:g} GB" for c in plan.cards)]
    rows = [header]
    for index, estimate in enumerate(plan.estimates):
        row = [label(estimate)]
        for card in plan.cards:
            usable = plan.usable(card)
            if estimate.peak <= usable:
                row.append("yes")
            elif plan.released and plan.released[index].peak <= usable:
                row.append("in backward")
            else:
                least = min([estimate, *plan.released[index : index + 1]], key=lambda e: e.peak)
                row.append(f"+{_gib(least.peak - usable)}")
        rows.append(row)
    note = "in backward: if stepping in the backward (came8bit's own optimizers can; with others "
    note += "it takes hooks and an optimizer per parameter). +x: x GiB too much."
    return "\n".join([*_aligned(rows), *(textwrap.wrap(note, 99) if plan.released else [])])


def _advice(plan: Plan) -> list[str]:
    """For each card the first way that fits; the lines of Python once per way."""
    rows: list[str] = []
    printed: dict[str, planner.Way] = {}
    for card in plan.cards:
        way = planner.smallest_effort(plan.ways, plan.usable(card))
        if way is None:
            least = min(plan.ways, key=lambda way: way.estimate.peak)
            missing = _gib(least.estimate.peak - plan.usable(card))
            rows.append(
                f"{card:g} GB: does not fit; the smallest way ({title(least)}) needs {missing} GiB "
                f"more. {_what_is_left(plan, least, plan.usable(card))}"
            )
            continue
        rest = plan.usable(card) - way.estimate.peak
        text = (
            f"{card:g} GB: {title(way)}; peak {_gib(way.estimate.peak)} GiB, {_gib(rest)} to spare"
        )
        if way.estimate.activations_known and way.setup.activations is None:
            batch = planner.largest_batch(plan.model, way, plan.usable(card))
            text += f", room for batch {batch}"
        if way.estimate.host:
            text += f"; {_gib(way.estimate.host)} GiB of pinned host memory"
        rows.append(text + ".")
        printed.setdefault(title(way), way)
    wrapped = [textwrap.fill(row, 99, subsequent_indent="    ") for row in rows]
    blocks = ["With CAME8bit, the least that is needed:\n" + "\n".join(wrapped)]
    for name, way in printed.items():
        lines = planner.python_lines(plan.model, way)
        blocks.append(name + ":\n" + textwrap.indent("\n".join(lines), "    "))
    return blocks


def _what_is_left(plan: Plan, least: planner.Way, usable: int) -> str:
    """What helps where even the smallest way, ``least``, does not fit."""
    setup, parameters = least.setup, least.estimate.parameters
    half = "--dtype bf16 halves that. Else a" if setup.dtype == "fp32" else "A"
    if parameters > usable:
        return (
            f"The parameters alone take {_gib(parameters)} GiB, and {_gib(usable)} are there: no "
            f"batch or sequence is small enough. {half} larger card or a smaller model is left, or "
            "LoRA on quantized parameters."
        )
    # Which way is the smallest depends on the batch, so each of them is tried.
    sequence = max(planner.longest_sequence(plan.model, way, usable) for way in plan.ways)
    if sequence:
        return (
            f"It fits with --batch 1 --sequence {sequence}; what is left besides is training fewer "
            "parameters (LoRA)."
        )
    given = setup.activations or 0
    if given and least.estimate.peak - given <= usable:
        return (
            "A shorter sequence or a smaller batch, and so fewer activations than the given ones, "
            "are left, or training fewer parameters (LoRA)."
        )
    there = "parameters, state and gradients"
    if least.estimate.activations_known and not given:
        there += f" are too large, even with batch 1 and {min(setup.sequence, planner.SHORTEST)} "
        there += "tokens"
    else:
        there += " alone are too large"
    return f"{there.capitalize()}. {half} larger card is left, or training fewer parameters (LoRA)."


def title(way: planner.Way) -> str:
    """Optimizer and measures in a few words."""
    words = [label(way.estimate)]
    words += ["activation checkpointing"] if way.setup.checkpointing else []
    words += ["step in backward"] if way.setup.release else []
    return ", ".join(words)


# --- JSON -----------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes."""
    model = plan.model
    return {
        "model": {
            "name": model.name,
            "source": model.source,
            "parameters": model.numel,
            "tensors": len(model.parameters),
            "notes": list(model.notes),
        },
        "setup": asdict(plan.setup),
        "estimates": [_estimate(e) for e in plan.estimates],
        "step_in_backward": [_estimate(e) for e in plan.released],
        "reserve": plan.reserve,
        "cards": [_card(plan, card) for card in plan.cards],
    }


def _estimate(estimate: planner.Estimate) -> dict[str, Any]:
    return {
        "optimizer": estimate.optimizer,
        "peak": estimate.peak,
        "peak_moment": estimate.peak_moment.name,
        "at_peak": estimate.parts(),
        "host": estimate.host,
        "gradients": estimate.gradients,
        "state": {
            "bytes": estimate.state.nbytes,
            "device": dict(estimate.state.device),
            "host": dict(estimate.state.host),
            "staging": estimate.state.staging,
        },
        "activations_known": estimate.activations_known,
        "moments": [{**asdict(m), "bytes": m.nbytes} for m in estimate.moments],
    }


def _card(plan: Plan, card: float) -> dict[str, Any]:
    usable = plan.usable(card)
    way = planner.smallest_effort(plan.ways, usable)
    found = None
    if way is not None:
        found = {
            "optimizer": way.estimate.optimizer,
            "checkpointing": way.setup.checkpointing,
            "step_in_backward": way.setup.release,
            "peak": way.estimate.peak,
            "host": way.estimate.host,
            "python": planner.python_lines(plan.model, way),
        }
    return {
        "gib": card,
        "usable": usable,
        "fits": [e.optimizer for e in plan.estimates if e.peak <= usable],
        "fits_with_step_in_backward": [e.optimizer for e in plan.released if e.peak <= usable],
        "came8bit": found,
    }
