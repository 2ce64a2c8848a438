"""What fits where, before anything is allocated.

A :class:`Model` is parameters by shape and, where its kind is known, an architecture that says what
its layers keep for the backward.  It comes from a Hugging Face config.json, the header of a
safetensors file, or by name.  :func:`estimate` adds up what training it with one of
:data:`OPTIMIZERS` takes, moment by moment; :func:`ways` looks for settings that fit a card.

Parameters, gradients and state are exact.  Activations are an estimate, whose error is measured by
``benchmarks/planner.py``; ``docs/planner.md`` says what is counted and what is not.
"""

from ..errors import UnknownModel
from .advice import (
    CARDS,
    GIB,
    RESERVE,
    SHORTEST,
    Way,
    largest_batch,
    longest_sequence,
    python_lines,
    smallest_effort,
    ways,
)
from .configs import FAMILIES, architecture_of
from .estimate import ITEMSIZE, Estimate, Moment, Setup, estimate
from .model import Architecture, Model, Parameter, Stage, from_architecture
from .named import CONFIGS, named
from .optimizers import OPTIMIZERS, OptimizerKind, Options, State
from .sources import from_path

__all__ = [
    "CARDS",
    "CONFIGS",
    "FAMILIES",
    "GIB",
    "ITEMSIZE",
    "OPTIMIZERS",
    "RESERVE",
    "SHORTEST",
    "Architecture",
    "Estimate",
    "Model",
    "Moment",
    "OptimizerKind",
    "Options",
    "Parameter",
    "Setup",
    "Stage",
    "State",
    "UnknownModel",
    "Way",
    "architecture_of",
    "estimate",
    "from_architecture",
    "from_path",
    "largest_batch",
    "longest_sequence",
    "named",
    "python_lines",
    "smallest_effort",
    "ways",
]
