"""Plan the memory of training before anything is allocated.

A :class:`Model` is parameters by shape and, where transformers or diffusers can build it, a
workload that runs on fake tensors. It comes from a Hugging Face config.json, from headers of
safetensors files, or by name. :func:`estimate` adds up what training it with one of
:data:`OPTIMIZERS` takes, moment by moment; :func:`ways` looks for setups that fit a GPU.
``docs/planner.md`` says what is counted and what is not.
"""

from ..errors import UnknownModel
from .activations import Model, Parameter, StorageCounter, Trace, Untraceable, Workload, trace
from .estimate import (
    GIB,
    GPUS,
    ITEMSIZE,
    RESERVE,
    SHORTEST,
    Estimate,
    Moment,
    Setup,
    Way,
    estimate,
    largest_batch,
    longest_sequence,
    python_lines,
    smallest_effort,
    ways,
)
from .optimizers import OPTIMIZERS, OptimizerKind, Options, State
from .sources import CONFIGS, check_numbers, from_path, named
from .workloads import from_config

__all__ = [
    "CONFIGS",
    "GIB",
    "GPUS",
    "ITEMSIZE",
    "OPTIMIZERS",
    "RESERVE",
    "SHORTEST",
    "Estimate",
    "Model",
    "Moment",
    "OptimizerKind",
    "Options",
    "Parameter",
    "Setup",
    "State",
    "StorageCounter",
    "Trace",
    "UnknownModel",
    "Untraceable",
    "Way",
    "Workload",
    "check_numbers",
    "estimate",
    "from_config",
    "from_path",
    "largest_batch",
    "longest_sequence",
    "named",
    "python_lines",
    "smallest_effort",
    "trace",
    "ways",
]
