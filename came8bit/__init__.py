"""came8bit: CAME with its momentum in 8 bits.

Use :class:`CAME8bit` like any ``torch.optim`` optimizer.
"""

from ._version import __version__
from .checkpoint import (
    ConvertReport,
    LoadReport,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from .errors import CheckpointError
from .ops.libraries import status as kernel_status
from .ops.schema import dequantize_blockwise, quantize_blockwise
from .optim import CAME
from .param_groups import GlobalOptimManager
from .step_in_backward import GradientRelease, step_in_backward
from .variants import (
    CAME2,
    CAME4,
    CAME8,
    CAME2bit,
    CAME4bit,
    CAME8bit,
    CAME32bit,
    PagedCAME,
    PagedCAME2,
    PagedCAME2bit,
    PagedCAME4,
    PagedCAME4bit,
    PagedCAME8,
    PagedCAME8bit,
    PagedCAME32bit,
)

__all__ = [
    "CAME",
    "CAME2",
    "CAME4",
    "CAME8",
    "CAME2bit",
    "CAME4bit",
    "CAME8bit",
    "CAME32bit",
    "CheckpointError",
    "ConvertReport",
    "GlobalOptimManager",
    "GradientRelease",
    "LoadReport",
    "PagedCAME",
    "PagedCAME2",
    "PagedCAME2bit",
    "PagedCAME4",
    "PagedCAME4bit",
    "PagedCAME8",
    "PagedCAME8bit",
    "PagedCAME32bit",
    "__version__",
    "convert_checkpoint",
    "dequantize_blockwise",
    "inspect_checkpoint",
    "kernel_status",
    "load_checkpoint",
    "quantize_blockwise",
    "save_checkpoint",
    "step_in_backward",
]
