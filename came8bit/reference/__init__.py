"""The executable specification: the update rule, the codes, rounding and the order of sums."""

from .passes import (
    PASSES,
    FactoredStep,
    UnfactoredStep,
    factored_step_,
    sums_sizes,
    unfactored_step_,
    work_size,
)
from .reduction import CPU_TREE
from .update import Hyper

__all__ = [
    "CPU_TREE",
    "PASSES",
    "FactoredStep",
    "Hyper",
    "UnfactoredStep",
    "factored_step_",
    "sums_sizes",
    "unfactored_step_",
    "work_size",
]
