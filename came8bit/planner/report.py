"""The plan behind ``came8bit estimate``: what fits each GPU, as tables, text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import printable
from .activations import Model, Untraceable
from .estimate import (
    GIB,
    SHORTEST,
    Estimate,
    Setup,
    Way,
    estimate,
    largest_batch,
    longest_sequence,
    python_lines,
    smallest_effort,
    ways,
)
from .optimizers import OPTIMIZERS

#: part of the peak -> its letter in the bars and its heading in the table.
PARTS = {
    "parameters": ("P", "param"),
    "state": ("S", "state"),
    "staging": ("T", "staging"),
    "gradients": ("G", "grad"),
    "activations": ("A", "activ"),
    "logits": ("L", "logits"),
    "step": ("W", "step"),
}
_BAR = 40
BNB = "bitsandbytes"


@dataclass(frozen=True)
class Fit:
    """What fits a GPU.

    Attributes:
        gpu: its memory in GiB.
        usable: bytes of it that the plan may use.
        way: the first way of training that fits, if one does.
        batch: the largest micro-batch that fits with it; ``None`` if that is not known.
    """

    gpu: float
    usable: int
    way: Way | None
    batch: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that is printed.

    Attributes:
        model: what is trained.
        setup: how, as asked.
        estimates: one per optimizer, as asked.
        released: the same, stepping in the backward; empty where that is excluded, or asked anyway.
        reserve: bytes left free on each GPU.
        ways: in the order of effort.
        fits: one per GPU.
        chosen: index in ``fits``: the GPU that was asked for, or the smallest that something fits.
    """

    model: Model
    setup: Setup
    estimates: list[Estimate]
    released: list[Estimate]
    reserve: int
    ways: list[Way]
    fits: list[Fit]
    chosen: int


@dataclass(frozen=True)
class Table:
    """A table: the first ``left`` columns are aligned to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1
    marked: int | None = None  # index of a row that stands out


def make_plan(
    model: Model,
    setup: Setup,
    optimizers: Sequence[str],
    gpus: Sequence[float],
    reserve: int,
    *,
    paged: bool,
) -> Plan:
    """Compute everything; errors as in :func:`estimate`, but for models that cannot be traced."""
    if model.workload is not None and setup.activations is None:
        try:
            model.workload.trace(batch=setup.batch, **setup.traced)
        except Untraceable as error:
            model = replace(model, workload=None, unknown=str(error))
    kinds = [OPTIMIZERS[name] for name in optimizers]
    estimates = [estimate(model, kind, setup) for kind in kinds]
    released = []
    if not setup.release and not setup.accumulation:
        releasing = replace(setup, release=True)
        released = [estimate(model, kind, releasing) for kind in kinds]
    found = ways(model, setup, paged=paged)
    fits = []
    for gpu in gpus:
        usable = int(gpu * GIB) - reserve
        way = smallest_effort(found, usable)
        fits.append(Fit(gpu, usable, way, largest_batch(model, way, usable) if way else None))
    chosen = next((i for i, fit in enumerate(fits) if fit.way), len(fits) - 1)
    return Plan(model, setup, estimates, released, reserve, found, fits, chosen)


# --- words ----------------------------------------------------------------------------------------


def label(each: Estimate) -> str:
    """Return the optimizer's name."""
    return OPTIMIZERS[each.optimizer].label


def measures(setup: Setup) -> list[str]:
    """Return what ``setup`` does to save memory."""
    words = ["checkpointing"] if setup.checkpointing else []
    return words + (["step in backward"] if setup.release else [])


def title(way: Way) -> str:
    """Return optimizer and measures in a few words."""
    return ", ".join([label(way.estimate), *measures(way.setup)])


def describe(setup: Setup) -> str:
    """Return the setting in a few words."""
    words = [setup.dtype, f"batch {setup.batch} x {setup.sequence} tokens", *measures(setup)]
    words += ["gradient accumulation"] if setup.accumulation else []
    words += ["fp32 state for embeddings"] if setup.fp32_embeddings else []
    words += ["momentum of vectors quantized"] if setup.quantize_vectors else []
    words += [f"{setup.attention} attention"] if setup.attention else []
    return ", ".join(words)


def gib(nbytes: float) -> str:
    """Return ``nbytes`` in GiB."""
    value = nbytes / GIB
    return "-" if nbytes == 0 else f"{value:.2f}" if value >= 0.005 else "<0.01"


def heading(plan: Plan) -> list[str]:
    """Return what the plan is for, and what is not counted in it."""
    model = plan.model
    lines = [f"{model.name}: {model.numel:,} parameters, {describe(plan.setup)}"]
    if not plan.estimates[0].activations_known:
        why = model.unknown or "shapes alone do not tell them; the config.json does"
        lines.append(f"ACTIVATIONS ARE NOT COUNTED: {why}. --activations takes a number.")
    return [printable(line) for line in [*lines, *model.notes]]


# --- the answer -----------------------------------------------------------------------------------


def answer(plan: Plan) -> Table:
    """Return, for each GPU, the cheapest setup that fits it."""
    rows = []
    for fit in plan.fits:
        if fit.way is None:
            missing = min(way.estimate.peak for way in plan.ways) - fit.usable
            rows.append(
                [f"{fit.gpu:g} GB", f"does not fit, {gib(missing)} GiB too much", "", "", ""]
            )
            continue
        peak = fit.way.estimate.peak
        batch = "?" if fit.batch is None else str(fit.batch)
        rows.append([f"{fit.gpu:g} GB", title(fit.way), gib(peak), gib(fit.usable - peak), batch])
    return Table(
        f"Cheapest setup that fits each GPU, {gib(plan.reserve)} GiB left free:",
        ("GPU", "setup", "peak GiB", "spare", "batch"),
        rows,
        note="batch: the largest micro-batch that fits.",
        left=2,
        marked=plan.chosen if plan.fits[plan.chosen].way else None,
    )


def script(plan: Plan, fit: Fit) -> tuple[str, list[str]]:
    """Return a heading and the lines of Python for a GPU; or, where nothing fits it, what helps."""
    if fit.way is None:
        least = min(plan.ways, key=lambda way: way.estimate.peak)
        return f"{fit.gpu:g} GB: {_what_helps(plan, least, fit.usable)}", []
    said = f"{title(fit.way)}, for {fit.gpu:g} GB"
    if fit.way.estimate.host:
        said += f" and {gib(fit.way.estimate.host)} GiB of pinned host memory"
    return f"{said}:", python_lines(plan.model, fit.way)


def _what_helps(plan: Plan, least: Way, usable: int) -> str:
    """Return what helps where even the smallest way, ``least``, does not fit."""
    setup, parameters = least.setup, least.estimate.parameters
    other = "Use a larger GPU or train fewer parameters (LoRA)."
    if setup.dtype == "fp32":
        other = f"--dtype bf16 halves that. Else: {other[0].lower()}{other[1:]}"
    if parameters > usable:
        return (
            f"the parameters alone take {gib(parameters)} GiB of {gib(usable)}: no batch or "
            f"sequence is small enough. {other}"
        )
    # Which way is the smallest depends on the batch, so each of them is tried.
    sequence = max(longest_sequence(plan.model, way, usable) for way in plan.ways)
    if sequence:
        return f"--batch 1 --sequence {sequence} fits. {other}"
    given = setup.activations or 0
    if given and least.estimate.peak - given <= usable:
        return f"a shorter sequence or smaller batch than the given activations' may fit. {other}"
    there = "parameters, state and gradients alone are too large"
    if least.estimate.activations_known and not given:
        there += f", even with batch 1 and {min(setup.sequence, SHORTEST)} tokens"
    return f"{there}. {other}"


# --- the details ----------------------------------------------------------------------------------


def details(plan: Plan) -> list[Table]:
    """Return everything else: the peak's parts, buffers of state, and what fits, by optimizer."""
    return [_parts(plan), _state(plan), _fits(plan)]


def _parts(plan: Plan) -> Table:
    # Staging and temporaries of the step are small, and rarely there together.
    joined = ("staging", "step")
    columns = [part for part in PARTS if part not in joined]
    header = ["GiB", *(PARTS[part][1] for part in columns), "other", "PEAK", "host"]
    header += ["in bwd"] if plan.released else []
    rows = []
    for index, each in enumerate(plan.estimates):
        parts = each.parts()
        values = [parts[part] for part in columns] + [sum(parts[part] for part in joined)]
        values += [each.peak, each.host]
        values += [plan.released[index].peak] if plan.released else []
        rows.append([label(each), *map(gib, values)])
    moments = {each.peak_moment.name for each in plan.estimates}
    when = f" ({moments.pop()})" if len(moments) == 1 else ", which differs between optimizers"
    note = (
        f"The columns show the moment of the peak{when}. All gradients together: "
        f"{gib(plan.estimates[0].gradients)} GiB. other: device memory that paged state passes "
        "through, and temporaries of the step. host: memory outside the GPU."
    )
    note += " in bwd: the peak with a step in backward." if plan.released else ""
    theirs = [each for each in plan.estimates if OPTIMIZERS[each.optimizer].package == BNB]
    note += f" From bitsandbytes: {', '.join(map(label, theirs))}." if theirs else ""
    return Table("What the peak consists of:", header, rows, note)


def bars(plan: Plan) -> list[str]:
    """Return a bar per optimizer, a letter per part, on a common scale."""
    pairs = []
    for index, each in enumerate(plan.estimates):
        pairs.append((label(each), each))
        if plan.released:
            pairs.append(("", plan.released[index]))
    scale = max(each.peak for _, each in pairs)
    width = max(len(name) for name, _ in pairs)
    lines = [", ".join(f"{letter} {part}" for part, (letter, _) in PARTS.items())]
    if plan.released:
        lines.append("Second bar of each: step in backward.")
    for name, each in pairs:
        host = f" + {gib(each.host)} host" if each.host >= 0.005 * GIB else ""
        bar = bar_of(each.parts(), scale)
        lines.append(f"{name:<{width}} |{bar:<{_BAR}}| {gib(each.peak)}{host}")
    return lines


def bar_of(parts: dict[str, int], scale: int) -> str:
    """Return ``parts`` as letters, ``_BAR`` of them for ``scale`` bytes.

    Borders are rounded, not lengths, so the bar is as long as the sum says.
    """
    bar, total = "", 0
    for part, nbytes in parts.items():
        total += nbytes
        bar += PARTS[part][0] * (round(_BAR * total / scale) - len(bar))
    return bar


def _state(plan: Plan) -> Table:
    rows = []
    for each in plan.estimates:
        state = each.state
        buffers = [("device", item) for item in state.device.items()]
        buffers += [("host", item) for item in state.host.items()]
        rows.append([label(each), gib(state.nbytes), _per(plan, state.nbytes), ""])
        for where, (name, nbytes) in buffers:
            rows.append([f"  {name}", gib(nbytes), _per(plan, nbytes), where])
    return Table("State, buffer by buffer:", ("", "GiB", "bytes/param", "where"), rows)


def _per(plan: Plan, nbytes: int) -> str:
    return f"{nbytes / plan.model.numel:.4f}"


def _fits(plan: Plan) -> Table:
    rows = []
    for index, each in enumerate(plan.estimates):
        row = [label(each)]
        for fit in plan.fits:
            peaks = [each.peak, *(e.peak for e in plan.released[index : index + 1])]
            if peaks[0] <= fit.usable:
                row.append("yes")
            elif min(peaks) <= fit.usable:
                row.append("in bwd")
            else:
                row.append(f"+{gib(min(peaks) - fit.usable)}")
        rows.append(row)
    note = "+x: x GiB too much."
    if plan.released:
        note = "in bwd: with a step in backward (with optimizers other than came8bit's that takes "
        note += "hooks and an optimizer per parameter). +x: x GiB too much."
    header = ("", *(f"{fit.gpu:g} GB" for fit in plan.fits))
    return Table(f"Fits, with {gib(plan.reserve)} GiB left free:", header, rows, note)


# --- JSON -----------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """Return everything, in bytes."""
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
        "gpus": [_gpu(plan, fit) for fit in plan.fits],
    }


def _estimate(each: Estimate) -> dict[str, Any]:
    return {
        "optimizer": each.optimizer,
        "peak": each.peak,
        "peak_moment": each.peak_moment.name,
        "at_peak": each.parts(),
        "host": each.host,
        "gradients": each.gradients,
        "state": {
            "bytes": each.state.nbytes,
            "device": dict(each.state.device),
            "host": dict(each.state.host),
            "staging": each.state.staging,
        },
        "activations_known": each.activations_known,
        "moments": [{**asdict(m), "bytes": m.nbytes} for m in each.moments],
    }


def _gpu(plan: Plan, fit: Fit) -> dict[str, Any]:
    found = None
    if fit.way is not None:
        found = {
            "optimizer": fit.way.estimate.optimizer,
            "checkpointing": fit.way.setup.checkpointing,
            "step_in_backward": fit.way.setup.release,
            "peak": fit.way.estimate.peak,
            "host": fit.way.estimate.host,
            "largest_batch": fit.batch,
            "python": python_lines(plan.model, fit.way),
        }
    return {
        "gib": fit.gpu,
        "usable": fit.usable,
        "fits": [e.optimizer for e in plan.estimates if e.peak <= fit.usable],
        "fits_with_step_in_backward": [e.optimizer for e in plan.released if e.peak <= fit.usable],
        "came8bit": found,
    }
