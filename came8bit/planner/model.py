"""What the planner knows of a model: its parameters, and how to run it on fake tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .activations import Workload


@dataclass(frozen=True)
class Parameter:
    """A trained tensor.

    Attributes:
        name: as in ``model.named_parameters()``.
        shape: sizes.
        embedding: whether it is the table of an ``nn.Embedding``.
    """

    name: str
    shape: tuple[int, ...]
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        name: human-readable.
        source: where the shapes come from, human-readable.
        parameters: every parameter once.
        workload: what runs it; ``None`` where only shapes are known.
        notes: what the reader has to know, one sentence each.
        unknown: why activations are not known, where that needs saying.
    """

    name: str
    source: str
    parameters: tuple[Parameter, ...]
    workload: Workload | None = None
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
