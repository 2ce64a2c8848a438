"""What fits a card, and what to write to make it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .estimate import Estimate, Setup, estimate
from .model import Model
from .optimizers import OPTIMIZERS
from .sana import Sana

GIB = 1 << 30

#: Sizes of common cards.  What is sold as 24 GB reports about 24 * 2**30 bytes.
CARDS = (8, 12, 16, 24, 48)

#: What is left free by default: the CUDA context, libraries' workspaces, rounding and gaps of the
#: allocator.  A round assumption, not a measurement.
RESERVE = GIB

#: The shortest sequence that is worth a proposal.
SHORTEST = 128

_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Way:
    """A way to train a model.

    Attributes:
        setup: how.
        estimate: what that takes; its ``optimizer`` says with which.
    """

    setup: Setup
    estimate: Estimate


def ways(model: Model, setup: Setup, *, paged: bool = False) -> list[Way]:
    """Ways to train with CAME8bit, from the plainest to the smallest.

    Later ones cost something: stepping in the backward excludes accumulation and clipping by the
    global norm; checkpointing runs each layer's forward again; paging needs host memory and a bus.

    Args:
        model: what to train.
        setup: what all ways have at least.
        paged: whether all of them page.
    """
    release = [setup.release] if setup.release or setup.accumulation else [False, True]
    found: list[Way] = []
    for key in ("paged-came8bit",) if paged else ("came8bit", "paged-came8bit"):
        for checkpointing in sorted({setup.checkpointing, True}):
            for releasing in release:
                chosen = replace(setup, checkpointing=checkpointing, release=releasing)
                found.append(Way(chosen, estimate(model, OPTIMIZERS[key], chosen)))
    return found


def smallest_effort(found: list[Way], usable: int) -> Way | None:
    """The first of ``found`` whose peak is at most ``usable`` bytes."""
    return next((way for way in found if way.estimate.peak <= usable), None)


def largest_batch(model: Model, way: Way, usable: int) -> int:
    """The largest micro-batch with which ``way`` stays within ``usable`` bytes; 0 if none does."""
    optimizer = OPTIMIZERS[way.estimate.optimizer]

    def fits(batch: int) -> bool:
        return estimate(model, optimizer, replace(way.setup, batch=batch)).peak <= usable

    if not fits(1):
        return 0
    good, bad = 1, 2
    while bad <= _LARGEST_BATCH and fits(bad):
        good, bad = bad, 2 * bad
    if bad > _LARGEST_BATCH:
        return good
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def longest_sequence(model: Model, way: Way, usable: int) -> int:
    """The longest sequence that fits into ``usable`` bytes, one at a time; 0 if none does.

    Sequences are those of ``way``, halved as often as necessary, but not below :data:`SHORTEST`.
    Where activations are not known or given, it is 0: they do not depend on the sequence then.
    """
    if model.architecture is None or way.setup.activations is not None:
        return 0
    optimizer, sequence = OPTIMIZERS[way.estimate.optimizer], way.setup.sequence
    while True:
        setup = replace(way.setup, batch=1, sequence=sequence)
        if estimate(model, optimizer, setup).peak <= usable:
            return sequence
        if sequence <= SHORTEST:
            return 0
        sequence = max(SHORTEST, sequence // 2)


def python_lines(model: Model, way: Way) -> list[str]:
    """The lines of a training script that make ``way``."""
    setup, optimizer = way.setup, OPTIMIZERS[way.estimate.optimizer]
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[setup.dtype]
    lines = ["import came8bit, torch", "", f"model = model.to(device='cuda', dtype=torch.{dtype})"]
    # In eval mode, transformers ignores checkpointing without a word.
    lines.append("model.train()  # from_pretrained returns it in eval mode")
    if setup.checkpointing:
        if isinstance(model.architecture, Sana):
            lines.append("model.enable_gradient_checkpointing()")
        else:
            lines.append("model.gradient_checkpointing_enable({'use_reentrant': False})")
    options = ["lr=2e-4"]
    if setup.min_8bit_size != Setup.min_8bit_size:
        options.append(f"min_8bit_size={setup.min_8bit_size}")
    if setup.budget is not None and optimizer.key.startswith("paged"):
        options.append(f"page_budget={setup.budget}")
    parameters = "model.parameters()"
    if setup.fp32_embeddings and any(parameter.embedding for parameter in model.parameters):
        lines += [
            "tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]",
            "others = [p for p in model.parameters() if all(p is not t for t in tables)]",
        ]
        parameters = "[{'params': tables, 'optim_bits': 32}, {'params': others}]"
    lines.append(f"optimizer = came8bit.{optimizer.label}({parameters}, {', '.join(options)})")
    if setup.release:
        lines.append("release = came8bit.step_in_backward(optimizer)")
    if model.architecture is not None and model.architecture.logits:
        lines += ["", "loss = model(**batch).loss  # and not the outputs: they hold the logits"]
    else:
        lines.append("")
    return [*lines, "loss.backward()", "optimizer.step()", "optimizer.zero_grad()"]
