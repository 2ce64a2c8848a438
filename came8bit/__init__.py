"""came8bit: CAME with its momentum in 8 bits.

Use :class:`CAME8bit` like any ``torch.optim`` optimizer.
"""

from ._kernels import status as kernel_status
from ._ops import dequantize_blockwise, quantize_blockwise
from .optim import CAME, CAME8bit, CAME32bit, PagedCAME, PagedCAME8bit, PagedCAME32bit

__version__ = "0.1.0"

__all__ = [
    "CAME",
    "CAME8bit",
    "CAME32bit",
    "PagedCAME",
    "PagedCAME8bit",
    "PagedCAME32bit",
    "__version__",
    "dequantize_blockwise",
    "kernel_status",
    "quantize_blockwise",
]
