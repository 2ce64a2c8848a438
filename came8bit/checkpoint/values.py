"""Options of a parameter group as JSON, exactly: tuples, infinities and small tensors included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .error import CheckpointError

_LARGEST_TENSOR = 4096  # bytes; options are numbers, not buffers
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def encode(value: Any, what: str) -> Any:
    """``value`` in terms of JSON; :func:`decode` gives it back with its types and bits.

    NumPy's numbers become Python's.

    Args:
        value: ``None``, bool, number, str, tuple, list, dict with str keys, or a small tensor.
        what: names the value in the error message.

    Raises:
        CheckpointError: anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, list):
        return [encode(item, what) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, what) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, what) for key, item in value.items()}}
    if isinstance(value, Tensor):
        return {"tensor": _encode_tensor(value, what)}
    raise CheckpointError(
        f"{what} is a {type(value).__name__}, expected None, a bool, number, string, small tensor, "
        "or tuples, lists and dicts of these; remove it from the parameter group or convert it"
    )


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`; tensors are on the CPU.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: ``value`` did not come from there.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float({"inf": "inf", "-inf": "-inf", "nan": "nan"}[content])
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "dict":
        return {key: decode(item) for key, item in content.items()}
    if kind == "tensor":
        data = torch.tensor(list(bytes.fromhex(content["bytes"])), dtype=torch.uint8)
        return data.view(_DTYPES[content["dtype"]]).reshape(content["shape"])
    raise ValueError(f"unknown kind of value {kind!r}")


def _encode_tensor(value: Tensor, what: str) -> dict[str, Any]:
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.layout != torch.strided or value.nbytes > _LARGEST_TENSOR:
        raise CheckpointError(
            f"{what} is a tensor of {value.dtype}, layout {value.layout} and {value.nbytes} bytes, "
            f"expected a dense real one of at most {_LARGEST_TENSOR} bytes; remove it from the "
            "parameter group"
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    return {
        "dtype": name,
        "shape": list(value.shape),
        "bytes": bytes(flat.view(torch.uint8).tolist()).hex(),
    }
