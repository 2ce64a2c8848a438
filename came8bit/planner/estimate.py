"""What is in memory during a training step, and what fits a GPU.

The moments are forward, backward and the optimizer's step. The peak is the largest of them, so
gradients and activations, which never exist all at once, are not added up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .activations import Model, Parameter, Trace, Untraceable
from .optimizers import OPTIMIZERS, OptimizerKind, Options, State

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 1 << 30

#: Sizes of common GPUs. What is sold as 24 GB reports about 24 * 2**30 bytes.
GPUS = (8, 12, 16, 24, 32, 48, 80)

#: What is left free by default: the CUDA context, libraries' workspaces, rounding and gaps of the
#: allocator. A round assumption, not a measurement.
RESERVE = GIB

#: The shortest sequence that is worth a proposal.
SHORTEST = 128

_LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Setup:
    """How the model is trained.

    Attributes:
        dtype: of parameters, gradients and activations: a key of :data:`ITEMSIZE`.
        batch: sequences in a micro-batch.
        sequence: tokens in each.
        checkpointing: whether a layer keeps its input only and runs again in the backward.
        release: whether each parameter is updated in the backward and its gradient freed.
        accumulation: whether gradients of several micro-batches are added up, so that they all
            exist during forward and backward.
        fp32_embeddings: see :class:`Options`.
        quantize_vectors: see :class:`Options`.
        min_8bit_size: see :class:`Options`.
        budget: see :class:`Options`.
        activations: bytes of activations, from a measurement, in place of the trace.
        attention: ``"sdpa"``, ``"eager"``, or ``None`` for the model's default.

    Raises:
        ValueError: a value that does not exist, or two that exclude each other.
    """

    dtype: str = "bf16"
    batch: int = 1
    sequence: int = 1024
    checkpointing: bool = False
    release: bool = False
    accumulation: bool = False
    fp32_embeddings: bool = False
    quantize_vectors: bool = False
    min_8bit_size: int = Options.min_8bit_size
    budget: int | None = None
    activations: int | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of {', '.join(ITEMSIZE)}")
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, expected at least 1")
        for name in ("min_8bit_size", "budget", "activations"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, expected 0 or more")
        if self.release and self.accumulation:
            raise ValueError(
                "gradients that are freed in the backward cannot be accumulated: leave out one of "
                "release and accumulation"
            )

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def options(self) -> Options:
        """What the optimizers' state depends on."""
        names = ("min_8bit_size", "fp32_embeddings", "quantize_vectors", "budget")
        return Options(self.itemsize, **{name: getattr(self, name) for name in names})

    @property
    def traced(self) -> dict[str, Any]:
        """What a trace depends on besides the batch."""
        names = ("dtype", "sequence", "checkpointing", "attention")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Moment:
    """What a moment of a training step needs besides parameters and state, in bytes."""

    name: str
    activations: int = 0
    logits: int = 0
    gradients: int = 0
    step: int = 0

    @property
    def nbytes(self) -> int:
        """Their sum."""
        return self.activations + self.logits + self.gradients + self.step


@dataclass(frozen=True)
class Estimate:
    """Memory of one model with one optimizer. All numbers are bytes.

    Attributes:
        optimizer: key of the optimizer.
        setup: how the model is trained.
        parameters: of the model.
        state: see :class:`State`.
        gradients: of all parameters together, whether or not they exist at once.
        moments: the highest point of forward, backward and step: what comes on top.
        activations_known: whether activations are counted at all.
    """

    optimizer: str
    setup: Setup
    parameters: int
    state: State
    gradients: int
    moments: tuple[Moment, ...]
    activations_known: bool

    @property
    def peak_moment(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.nbytes)

    @property
    def resident(self) -> int:
        """Bytes on the device all the time."""
        return self.parameters + sum(self.state.device.values()) + self.state.staging

    @property
    def peak(self) -> int:
        """Bytes on the device at the highest point."""
        return self.resident + self.peak_moment.nbytes

    @property
    def host(self) -> int:
        """Bytes in the memory of the host."""
        return sum(self.state.host.values())

    def parts(self) -> dict[str, int]:
        """Return what the peak consists of."""
        moment = self.peak_moment
        return {
            "parameters": self.parameters,
            "state": sum(self.state.device.values()),
            "staging": self.state.staging,
            "gradients": moment.gradients,
            "activations": moment.activations,
            "logits": moment.logits,
            "step": moment.step,
        }


def estimate(
    model: Model, optimizer: OptimizerKind, setup: Setup, trace: Trace | None = None
) -> Estimate:
    """Add up the memory of training ``model``.

    Args:
        model: what is trained.
        optimizer: with what.
        setup: how.
        trace: of the activations; by default, ``model`` is traced.

    Raises:
        ValueError: the sequence is longer than the model's table of positions.
        Untraceable: the model does not run on fake tensors.
    """
    numel = model.numel
    if trace is None and model.workload is not None and setup.activations is None:
        trace = model.workload.trace(batch=setup.batch, **setup.traced)
    if trace is not None:
        moments = _traced(model, optimizer, setup, trace)
    else:
        # Activations and gradients are not known to be apart: all of both.
        sizes = [parameter.numel * setup.itemsize for parameter in model.parameters]
        gradients = max(sizes) if setup.release else sum(sizes)
        step = _temporaries(optimizer, setup, [model.largest]) if setup.release else 0
        moments = [Moment("backward", setup.activations or 0, 0, gradients, step)]
    if not setup.release:
        every, step = numel * setup.itemsize, _temporaries(optimizer, setup, model.parameters)
        moments.append(Moment("step", gradients=every, step=step))
    return Estimate(
        optimizer=optimizer.key,
        setup=setup,
        parameters=numel * setup.itemsize,
        state=optimizer.state(model.parameters, setup.options),
        gradients=numel * setup.itemsize,
        moments=tuple(moments),
        activations_known=trace is not None or setup.activations is not None,
    )


def _temporaries(optimizer: OptimizerKind, setup: Setup, parameters: Iterable[Parameter]) -> int:
    return optimizer.temporaries(list(parameters), setup.options)


def _traced(model: Model, optimizer: OptimizerKind, setup: Setup, trace: Trace) -> list[Moment]:
    """Return the highest points of forward and backward."""
    gradients, step = trace.gradients.copy(), np.zeros_like(trace.alive)
    if setup.release:  # each update takes place where its gradient is complete
        by_name = {parameter.name: parameter for parameter in model.parameters}
        for index, name in trace.updates:
            extra = _temporaries(optimizer, setup, [by_name[name]])
            step[index] = max(step[index], extra)
    elif setup.accumulation:
        gradients += model.numel * setup.itemsize
    else:
        gradients += trace.complete
    activations = trace.alive - trace.gradients - trace.logits
    total = activations + trace.logits + gradients + step
    found = []
    for name, start, end in (
        ("forward", 0, trace.backward),
        ("backward", trace.backward, len(total)),
    ):
        at = start + int(total[start:end].argmax())
        parts = (activations[at], trace.logits[at], gradients[at], step[at])
        found.append(Moment(name, *map(int, parts)))
    return found


# --- what fits a GPU ------------------------------------------------------------------------------


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
    """Return ways to train with this package, from the plainest to the smallest.

    Later ones cost something: stepping in the backward excludes accumulation and clipping by the
    global norm; checkpointing runs each layer's forward again; momentum of fewer bits is rounded
    more; paging needs host memory and a bus. Checkpointing is left out where the model does not
    have it.

    Args:
        model: what to train.
        setup: what all ways have at least.
        paged: whether all of them page.
    """
    release = [setup.release] if setup.release or setup.accumulation else [False, True]
    found: list[Way] = []
    keys = ("came8bit", "came4bit", "came2bit", "paged-came8bit")
    for key in keys[-1:] if paged else keys:
        for checkpointing in sorted({setup.checkpointing, True}):
            for releasing in release:
                chosen = replace(setup, checkpointing=checkpointing, release=releasing)
                try:
                    found.append(Way(chosen, estimate(model, OPTIMIZERS[key], chosen)))
                except Untraceable:
                    if checkpointing == setup.checkpointing:
                        raise
    return found


def smallest_effort(found: list[Way], usable: int) -> Way | None:
    """Return the first of ``found`` whose peak is at most ``usable`` bytes."""
    return next((way for way in found if way.estimate.peak <= usable), None)


def largest_batch(model: Model, way: Way, usable: int) -> int | None:
    """Return the largest micro-batch with which ``way`` stays within ``usable`` bytes.

    It is 0 if none does, and ``None`` if it cannot be told.
    """
    workload, optimizer = model.workload, OPTIMIZERS[way.estimate.optimizer]
    if workload is None or way.setup.activations is not None:
        return None
    # Bytes that are there anyway are not counted anew for every batch.
    state = way.estimate.state
    known = replace(optimizer, state=lambda parameters, options: state)

    def fits(batch: int) -> bool:
        setup = replace(way.setup, batch=batch)
        trace = workload.at_batch(batch, **setup.traced)
        if trace is None:
            raise Untraceable("its operators depend on the batch")
        return estimate(model, known, setup, trace).peak <= usable

    try:
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
    except Untraceable:
        return None
    return good


def longest_sequence(model: Model, way: Way, usable: int) -> int:
    """Return the longest sequence that fits into ``usable`` bytes, alone; 0 if none does.

    Sequences are those of ``way``, halved as often as necessary, but not below :data:`SHORTEST`.
    Where activations are not known or given, it is 0: they do not depend on the sequence then.
    """
    if model.workload is None or way.setup.activations is not None:
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
    """Return the lines of a training script that make ``way``."""
    setup, optimizer = way.setup, OPTIMIZERS[way.estimate.optimizer]
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[setup.dtype]
    lines = ["import came8bit, torch", "", f"model = model.to(device='cuda', dtype=torch.{dtype})"]
    # In eval mode, transformers ignores checkpointing without a word.
    lines.append("model.train()  # from_pretrained returns it in eval mode")
    if setup.checkpointing:
        turn_on = model.workload.checkpointing if model.workload else ""
        lines.append(turn_on or "model.gradient_checkpointing_enable({'use_reentrant': False})")
    options = ["lr=2e-4"]
    if setup.min_8bit_size != Setup.min_8bit_size:
        options.append(f"min_8bit_size={setup.min_8bit_size}")
    if setup.quantize_vectors:
        options.append("quantize_vectors=True")
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
    lines.append("")
    if model.workload is not None and model.workload.vocabulary:
        lines.append("loss = model(**batch).loss  # and not the outputs: they hold the logits")
    return [*lines, "loss.backward()", "optimizer.step()", "optimizer.zero_grad()"]
