"""The executable specification: the update rule, the codes, rounding and the order of sums."""

from .update import Hyper, factored_step_, unfactored_step_

__all__ = ["Hyper", "factored_step_", "unfactored_step_"]
