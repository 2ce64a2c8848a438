"""Operators of the ``came8bit`` namespace: schemas, fakes, and the reference as default kernel.

The compiled libraries only register kernels for their device; dispatch is PyTorch's.  An operator
takes a whole list of parameters, so a step is a handful of calls whatever the size of the model.

``views`` holds five integers per parameter: ``b, n, k, index, offset`` (:class:`reference.View`).
``hyper`` is ``beta1, beta2, beta3, eps1, eps2, clip_threshold, lr, weight_decay``.
``options`` is ``stochastic, cautious, propagate, maximize, bias_correction, seed``.
``lr_tensor``, a 0-d tensor, takes the place of ``lr`` in ``hyper``.
``absmax`` is empty when the momentum is fp32; otherwise ``exp_avg`` holds int8 codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import quant
from . import cpu_library, cuda_library

_library = torch.library.Library("came8bit", "DEF")

_COMMON_STATE = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] absmax"
_COMMON_END = "int[] views, Tensor? lr_tensor, float[] hyper, int[] options"

_library.define(
    f"factored_step_({_COMMON_STATE}, Tensor(d!)[] exp_avg_sq_row, Tensor(e!)[] exp_avg_sq_col, "
    "Tensor(f!)[] exp_avg_res_row, Tensor(g!)[] exp_avg_res_col, Tensor(h!)[] rms_ratio, "
    f"Tensor(i!)[] step, Tensor(j!)[] skipped, {_COMMON_END}) -> ()"
)
_library.define(
    f"unfactored_step_({_COMMON_STATE}, Tensor(d!)[] exp_avg_sq, "
    f"Tensor(e!)[] step, Tensor(f!)[] skipped, {_COMMON_END}) -> ()"
)
_library.define("quantize_blockwise(Tensor x) -> (Tensor codes, Tensor absmax)")
_library.define("dequantize_blockwise(Tensor codes, Tensor absmax) -> Tensor")

VIEW_INTS = 5


def _hyper(
    lr_tensor: Tensor | None, hyper: Sequence[float], options: Sequence[int]
) -> reference.Hyper:
    beta1, beta2, beta3, eps1, eps2, clip_threshold, lr, weight_decay = hyper
    stochastic, cautious, propagate, maximize, bias_correction = map(bool, options[:5])
    return reference.Hyper(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        eps1=eps1,
        eps2=eps2,
        clip_threshold=clip_threshold,
        lr=lr,
        weight_decay=weight_decay,
        lr_tensor=lr_tensor,
        stochastic=stochastic,
        cautious=cautious,
        propagate=propagate,
        maximize=maximize,
        bias_correction=bias_correction,
        seed=options[5],
    )


def _view(views: Sequence[int], i: int) -> reference.View:
    return reference.View(*views[i * VIEW_INTS : (i + 1) * VIEW_INTS])


def _warn_of_reference(tensors: Sequence[Tensor]) -> None:
    """Say once that tensors on a GPU are not where they could be computed faster."""
    if tensors and tensors[0].is_cuda:
        cuda_library.warn_once()


def _factored_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    absmax: list[Tensor],
    exp_avg_sq_row: list[Tensor],
    exp_avg_sq_col: list[Tensor],
    exp_avg_res_row: list[Tensor],
    exp_avg_res_col: list[Tensor],
    rms_ratio: list[Tensor],
    step: list[Tensor],
    skipped: list[Tensor],
    views: list[int],
    lr_tensor: Tensor | None,
    hyper: list[float],
    options: list[int],
) -> None:
    _warn_of_reference(params)
    settings = _hyper(lr_tensor, hyper, options)
    for i in range(len(params)):
        reference.factored_step_(
            params[i],
            grads[i],
            exp_avg[i],
            absmax[i] if absmax else None,
            exp_avg_sq_row[i],
            exp_avg_sq_col[i],
            exp_avg_res_row[i],
            exp_avg_res_col[i],
            rms_ratio[i],
            step[i],
            skipped[i],
            _view(views, i),
            settings,
        )


def _unfactored_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    absmax: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: list[Tensor],
    skipped: list[Tensor],
    views: list[int],
    lr_tensor: Tensor | None,
    hyper: list[float],
    options: list[int],
) -> None:
    _warn_of_reference(params)
    settings = _hyper(lr_tensor, hyper, options)
    for i in range(len(params)):
        reference.unfactored_step_(
            params[i],
            grads[i],
            exp_avg[i],
            absmax[i] if absmax else None,
            exp_avg_sq[i],
            step[i],
            skipped[i],
            _view(views, i),
            settings,
        )


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    _warn_of_reference([x])
    return quant.quantize_blockwise(x)


def _dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    _warn_of_reference([codes])
    return quant.dequantize_blockwise(codes, absmax)


_DEFAULT = "CompositeExplicitAutograd"
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


cpu_library.load()

factored_step_ = torch.ops.came8bit.factored_step_.default
unfactored_step_ = torch.ops.came8bit.unfactored_step_.default
quantize_blockwise = torch.ops.came8bit.quantize_blockwise.default
dequantize_blockwise = torch.ops.came8bit.dequantize_blockwise.default
