"""What the planner knows of a model: its parameters, and what its layers keep for the backward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Parameter:
    """One trained tensor.

    Attributes:
        name: as in ``model.named_parameters()``.
        shape: sizes.
        stage: the :class:`Stage` whose backward makes its gradient; empty where that is not known.
        embedding: whether it is the table of an ``nn.Embedding``.
    """

    name: str
    shape: tuple[int, ...]
    stage: str = ""
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stage:
    """A part of the model that the backward passes through in one go.

    Attributes:
        name: unique in the model.
        kept: bytes of activations that the forward keeps for it.
        scratch: bytes that its backward needs besides ``kept``, at its highest point.
        layer: number of the repeated layer that it belongs to, ``None`` before and after them.
    """

    name: str
    kept: int
    scratch: int
    layer: int | None = None


class Architecture(Protocol):
    """Shapes and activations of one kind of model; a frozen dataclass of its sizes."""

    @property
    def layers(self) -> int:
        """Number of repeated layers, the units of activation checkpointing."""

    @property
    def hidden(self) -> int:
        """Width of what a layer receives and returns, per token."""

    @property
    def logits(self) -> int:
        """Numbers per token that go into a softmax: the vocabulary, or 0."""

    @property
    def tied(self) -> bool:
        """Whether the input embedding is the output layer, too."""

    @property
    def longest(self) -> int | None:
        """The longest sequence that there are position embeddings for; ``None``: no such table."""

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in the order of ``model.parameters()`` where that matters little.

        ``stage`` names one of :meth:`stages`.
        """

    def stages(self, batch: int, sequence: int, itemsize: int) -> list[Stage]:
        """Stages in the order of the forward, for one micro-batch.

        Args:
            batch: sequences.
            sequence: tokens in each.
            itemsize: bytes per element of parameters and activations, 2 or 4.
        """


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        name: for people.
        source: where the shapes come from, for people.
        parameters: every parameter once.
        architecture: what is known of its layers; ``None`` where only shapes are.
        notes: what the reader has to know, one sentence each.
        unknown: what its config.json describes, in a few words, where there is one and its layers
            are not known all the same.
    """

    name: str
    source: str
    parameters: tuple[Parameter, ...]
    architecture: Architecture | None = None
    notes: tuple[str, ...] = field(default=())
    unknown: str = ""

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def largest(self) -> Parameter:
        """The largest parameter."""
        return max(self.parameters, key=lambda parameter: parameter.numel)


def from_architecture(name: str, source: str, architecture: Architecture) -> Model:
    """Make the model of ``architecture``."""
    return Model(name, source, tuple(architecture.parameters()), architecture)


def weight_and_bias(name: str, shape: Iterable[int], bias: int, stage: str) -> list[Parameter]:
    """Weight of ``shape`` and, unless ``bias`` is 0, a bias of that length; a module ``name``."""
    found = [Parameter(f"{name}.weight", tuple(shape), stage)]
    if bias:
        found.append(Parameter(f"{name}.bias", (bias,), stage))
    return found
