"""Adds up what is in memory at each moment of a training step.

The moments are the loss (all activations and what the softmax needs), the backward of each stage
(activations of the stages before it, gradients of those behind it) and the optimizer's step.  The
peak is the largest of their sums, so gradients and activations, which are never all there together,
are not added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .model import Model, Parameter, Stage
from .optimizers import OptimizerKind, Options, State

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}

#: Bytes per logit at the highest point of the loss: the kept logarithm of the softmax, its gradient
#: and the gradient of the loss behind it, all fp32, whatever the dtype of the model.
LOSS_BYTES = 12


LOSS = "loss"  # name of the moment


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
        min_8bit_size: see :class:`Options`.
        budget: see :class:`Options`.
        activations: bytes of activations, from a measurement, in place of the estimate.

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
    min_8bit_size: int = Options.min_8bit_size
    budget: int | None = None
    activations: int | None = None

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
        return Options(self.itemsize, self.min_8bit_size, self.fp32_embeddings, self.budget)


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
    """Memory of one model with one optimizer.  All numbers are bytes.

    Attributes:
        optimizer: key of the optimizer.
        setup: how the model is trained.
        parameters: exact.
        state: exact; see :class:`State`.
        gradients: exact: of all parameters together, whether or not they exist at once.
        moments: what comes on top, moment by moment.
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
        """What the peak consists of."""
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


def estimate(model: Model, optimizer: OptimizerKind, setup: Setup) -> Estimate:
    """Add up the memory of training ``model``.

    Raises:
        ValueError: the sequence is longer than the model's table of positions.
    """
    architecture = model.architecture
    longest = architecture.longest if architecture else None
    if longest is not None and setup.sequence > longest:
        raise ValueError(
            f"got sequence {setup.sequence}, but {model.name} has positions up to {longest}"
        )
    numel = model.numel
    return Estimate(
        optimizer=optimizer.key,
        setup=setup,
        parameters=numel * setup.itemsize,
        state=optimizer.state(model.parameters, setup.options),
        gradients=numel * setup.itemsize,
        moments=tuple(_moments(model, optimizer, setup)),
        activations_known=architecture is not None or setup.activations is not None,
    )


def _moments(model: Model, optimizer: OptimizerKind, setup: Setup) -> list[Moment]:
    found = _forward_and_backward(model, setup)
    parameters = model.parameters
    if setup.release:
        # The step of one parameter takes place inside the backward, at its worst the largest's.
        extra = optimizer.temporaries([model.largest], setup.options)
        return [m if m.name == LOSS else replace(m, step=extra) for m in found]
    every = sum(parameter.numel for parameter in parameters) * setup.itemsize
    extra = optimizer.temporaries(parameters, setup.options)
    return [*found, Moment("step", gradients=every, step=extra)]


def _gradients(parameters: Sequence[Parameter], setup: Setup) -> int:
    """Bytes of gradients that the backward of a stage with ``parameters`` has at once."""
    sizes = [parameter.numel * setup.itemsize for parameter in parameters]
    return max(sizes, default=0) if setup.release else sum(sizes)


def _forward_and_backward(model: Model, setup: Setup) -> list[Moment]:
    if model.architecture is None or setup.activations is not None:
        # Activations and gradients are not known to be apart: all of both.
        every = _gradients(model.parameters, setup)
        return [Moment("backward", activations=setup.activations or 0, gradients=every)]
    architecture = model.architecture
    tokens, size = setup.batch * setup.sequence, setup.itemsize
    stages = architecture.stages(setup.batch, setup.sequence, size)
    by_stage: dict[str, list[Parameter]] = {stage.name: [] for stage in stages}
    for parameter in model.parameters:
        by_stage[parameter.stage].append(parameter)
    held = _held_activations(stages, setup, tokens * size * architecture.hidden)
    # A tied matrix has a gradient from the output layer on.  At the end the embedding's is added to
    # it, out of place: three of them exist for a moment.
    tied = 0
    if architecture.tied:
        tied = architecture.logits * architecture.hidden * size
    always = model.numel * size if setup.accumulation else 0
    logits = tokens * architecture.logits
    moments = [Moment(LOSS, activations=held[-1], logits=LOSS_BYTES * logits, gradients=always)]
    done = 0  # gradients of the stages behind, unless they are freed
    for index in reversed(range(len(stages))):
        stage = stages[index]
        is_last = stage.name == stages[-1].name
        own = _gradients(by_stage[stage.name], setup)
        if index in (0, len(stages) - 1):
            done += tied
        moments.append(
            Moment(
                f"backward of {stage.name}",
                activations=held[index] + stage.scratch,
                logits=size * logits if is_last else 0,
                gradients=always or done + own,
            )
        )
        if not setup.release:
            done += own
    return moments


def _held_activations(stages: Sequence[Stage], setup: Setup, layer_input: int) -> list[int]:
    """Bytes of activations that are there when the backward reaches each stage.

    With checkpointing a layer keeps ``layer_input`` bytes until its backward begins, and then all
    of its stages at once.
    """
    held: list[int] = []
    before = 0  # bytes kept by the stages, or layers, in front
    inside = 0  # bytes of the stages of this layer so far
    previous: int | None = None
    for stage in stages:
        if not setup.checkpointing or stage.layer is None:
            before += stage.kept
            held.append(before)
            continue
        if stage.layer != previous:
            before, inside, previous = before + layer_input, 0, stage.layer
        inside += stage.kept
        held.append(before + inside)
    return held
