"""Operators of the ``came8bit`` namespace: schemas, fakes, and the reference as default kernel.

The compiled libraries only register kernels for their device; dispatch is PyTorch's. An operator
takes a whole list of parameters, so a step is a handful of calls whatever the size of the model.

A factored parameter is ``b`` matrices of ``n`` rows and ``k`` columns, which the shapes of
``exp_avg_sq_row``, ``(b, n)``, and ``exp_avg_sq_col``, ``(b, k)``, say. ``param_index`` and
``element_offset``, the row-major index of the first element in the full parameter, choose the
random bits. ``absmax`` is empty when the momentum is fp32; otherwise ``exp_avg`` holds int8 codes.
``lr_tensor``, a 0-d tensor, takes the place of ``lr``. ``grad_squares``, fp32 with an element for
each parameter, is given the sum of squares of its gradient. The scalars are the fields of
:class:`~came8bit.reference.Hyper`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import quant
from . import libraries

_library = torch.library.Library("came8bit", "DEF")

_MOMENTUM = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] absmax"
_PLACES = "int[] param_index, int[] element_offset"
_SCALARS = (
    "Tensor? lr_tensor, float lr, float beta1, float beta2, float beta3, float eps1, float eps2, "
    "float clip_threshold, float weight_decay, bool stochastic, bool cautious, bool propagate, "
    "bool maximize, bool bias_correction, bool nesterov, int seed, Tensor(z!)? grad_squares=None"
)

_library.define(
    f"factored_step_({_MOMENTUM}, Tensor(d!)[] exp_avg_sq_row, Tensor(e!)[] exp_avg_sq_col, "
    "Tensor(f!)[] exp_avg_res_row, Tensor(g!)[] exp_avg_res_col, Tensor(h!)[] rms_ratio, "
    f"Tensor(i!)[] step, Tensor(j!)[] skipped, {_PLACES}, {_SCALARS}) -> ()"
)
_library.define(
    f"unfactored_step_({_MOMENTUM}, Tensor(d!)[] exp_avg_sq, "
    f"Tensor(e!)[] step, Tensor(f!)[] skipped, {_PLACES}, {_SCALARS}) -> ()"
)
_library.define("quantize_blockwise(Tensor x) -> (Tensor codes, Tensor absmax)")
_library.define("dequantize_blockwise(Tensor codes, Tensor absmax) -> Tensor")


def _warn_of_reference(tensors: Sequence[Tensor]) -> None:
    """Say once that tensors on a GPU are not where they could be computed faster."""
    if tensors and tensors[0].is_cuda:
        libraries.warn_once()


def _by_reference(name: str, step: Callable[..., Tensor]) -> Callable[..., None]:
    """Return ``step``, which takes one parameter, as a kernel of the operator ``name``."""
    names = [a.name for a in getattr(torch.ops.came8bit, name).default._schema.arguments]
    scalars = names.index("lr_tensor")

    def kernel(*values: Any, **named: Any) -> None:
        given = {**dict(zip(names, values, strict=False)), **named}
        grad_squares = given.pop("grad_squares", None)  # the dispatcher leaves defaults out
        lists = [given.pop(name) for name in names[:scalars]]
        hyper = reference.Hyper(**given)
        _warn_of_reference(lists[0])
        for i in range(len(lists[0])):
            # Only absmax may be empty.
            total = step(*(column[i] if column else None for column in lists), hyper)
            if grad_squares is not None:
                grad_squares[i] = total

    return kernel


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    _warn_of_reference([x])
    return quant.quantize_blockwise(x)


def _dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    _warn_of_reference([codes])
    return quant.dequantize_blockwise(codes, absmax)


_DEFAULT = "CompositeExplicitAutograd"
_factored_step = _by_reference("factored_step_", reference.factored_step_)
_unfactored_step = _by_reference("unfactored_step_", reference.unfactored_step_)
_library.impl("factored_step_", _factored_step, _DEFAULT)
_library.impl("unfactored_step_", _unfactored_step, _DEFAULT)
_library.impl("quantize_blockwise", _quantize, _DEFAULT)
_library.impl("dequantize_blockwise", _dequantize, _DEFAULT)


@torch.library.register_fake("came8bit::factored_step_", lib=_library)
@torch.library.register_fake("came8bit::unfactored_step_", lib=_library)
def _step_fake(params: list[Tensor], grads: list[Tensor], *rest: object) -> None:
    torch._check(
        len(params) == len(grads),
        lambda: f"got {len(grads)} gradients for {len(params)} parameters",
    )


@torch.library.register_fake("came8bit::quantize_blockwise", lib=_library)
def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(
        x.dtype == torch.float32,
        lambda: f"quantize_blockwise: got {x.dtype}, expected torch.float32; cast first",
    )
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(quant.absmax_shape(x.shape))


@torch.library.register_fake("came8bit::dequantize_blockwise", lib=_library)
def _dequantize_fake(codes: Tensor, absmax: Tensor) -> Tensor:
    torch._check(
        codes.dtype == torch.int8,
        lambda: f"dequantize_blockwise: got codes {codes.dtype}, expected torch.int8",
    )
    return absmax.new_empty(codes.shape)


libraries.load()

factored_step_ = torch.ops.came8bit.factored_step_.default
unfactored_step_ = torch.ops.came8bit.unfactored_step_.default
BY_REFERENCE: dict[Any, Callable[..., None]] = {
    factored_step_: _factored_step,
    unfactored_step_: _unfactored_step,
}
"""The same steps by the reference, whatever library is loaded."""
quantize_blockwise = torch.ops.came8bit.quantize_blockwise.default
dequantize_blockwise = torch.ops.came8bit.dequantize_blockwise.default
