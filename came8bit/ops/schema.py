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

Beside whole steps there is an operator for each of :data:`~came8bit.reference.PASSES`, for
parameters of which only some rows are here. A pass writes ``sums``, float64, for the ranks to add
up, and the next one takes them as ``reduced``; ``work`` is what stays here. ``full_numel`` is of
the full parameter; ``full_rows`` too, or 0 where whole matrices are here.
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
    "bool maximize, bool bias_correction, bool nesterov, int seed"
)

_STATE = {
    "factored": (
        f"{_MOMENTUM}, Tensor(d!)[] exp_avg_sq_row, Tensor(e!)[] exp_avg_sq_col, "
        "Tensor(f!)[] exp_avg_res_row, Tensor(g!)[] exp_avg_res_col, Tensor(h!)[] rms_ratio, "
        f"Tensor(i!)[] step, Tensor(j!)[] skipped, {_PLACES}"
    ),
    "unfactored": (
        f"{_MOMENTUM}, Tensor(d!)[] exp_avg_sq, Tensor(e!)[] step, Tensor(f!)[] skipped, {_PLACES}"
    ),
}
_BETWEEN = (
    "int[] full_numel, int[] full_rows, Tensor[] reduced, Tensor(k!)[] sums, Tensor(l!)[] work"
)
for kind, state in _STATE.items():
    _library.define(f"{kind}_step_({state}, {_SCALARS}, Tensor(z!)? grad_squares=None) -> ()")
    for name in reference.PASSES:
        _library.define(f"{kind}_{name}_({state}, {_BETWEEN}, {_SCALARS}) -> ()")
_library.define("quantize_blockwise(Tensor x) -> (Tensor codes, Tensor absmax)")
_library.define("dequantize_blockwise(Tensor codes, Tensor absmax) -> Tensor")


def _warn_of_reference(tensors: Sequence[Tensor]) -> None:
    """Say once that tensors on a GPU are not where they could be computed faster."""
    if tensors and tensors[0].is_cuda:
        libraries.warn_once()


_OF_ONE = {
    "params": "param",
    "grads": "grad",
    "param_index": "index",
    "element_offset": "offset",
    "full_numel": "numel",
    "full_rows": "rows",
}
"""Arguments that the reference, which takes one parameter, knows by other names."""


def _by_reference(name: str, run: Callable[..., Any]) -> Callable[..., None]:
    """Return ``run``, which takes one parameter, as a kernel of the operator ``name``."""
    names = [a.name for a in getattr(torch.ops.came8bit, name).default._schema.arguments]
    scalars = names.index("lr_tensor")

    def kernel(*values: Any, **named: Any) -> None:
        given = {**dict(zip(names, values, strict=False)), **named}
        grad_squares = given.pop("grad_squares", None)  # the dispatcher leaves defaults out
        lists = {_OF_ONE.get(name, name): given.pop(name) for name in names[:scalars]}
        hyper = reference.Hyper(**given)
        _warn_of_reference(lists["param"])
        for i in range(len(lists["param"])):
            # Only absmax may be empty; in the first and the last pass also reduced and sums.
            one = {name: column[i] if column else None for name, column in lists.items()}
            total = run(**one, hyper=hyper)
            if grad_squares is not None:
                grad_squares[i] = total

    return kernel


def _run_pass(step: Callable[..., Any], name: str) -> Callable[..., None]:
    """Return the pass ``name`` of the reference."""

    def run(*, reduced: Tensor | None, sums: Tensor | None, **operands: Any) -> None:
        between = [x for x in (reduced, sums) if x is not None]
        getattr(step(**operands, tree=reference.CPU_TREE), name)(*between)

    return run


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    _warn_of_reference([x])
    return quant.quantize_blockwise(x)


def _dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    _warn_of_reference([codes])
    return quant.dequantize_blockwise(codes, absmax)


_DEFAULT = "CompositeExplicitAutograd"
_KERNELS: dict[str, Callable[..., Any]] = {
    "factored_step_": reference.factored_step_,
    "unfactored_step_": reference.unfactored_step_,
}
for name in reference.PASSES:
    _KERNELS[f"factored_{name}_"] = _run_pass(reference.FactoredStep, name)
    _KERNELS[f"unfactored_{name}_"] = _run_pass(reference.UnfactoredStep, name)
for name, run in _KERNELS.items():
    _KERNELS[name] = _by_reference(name, run)
    _library.impl(name, _KERNELS[name], _DEFAULT)
_library.impl("quantize_blockwise", _quantize, _DEFAULT)
_library.impl("dequantize_blockwise", _dequantize, _DEFAULT)


def _step_fake(params: list[Tensor], grads: list[Tensor], *rest: object, **named: object) -> None:
    """Refuse state that has been sent to the meta device; it would bring the call here."""
    torch._check(
        len(params) == len(grads),
        lambda: f"got {len(grads)} gradients for {len(params)} parameters",
    )
    for values in (grads, *rest, *named.values()):
        if isinstance(values, list) and any(isinstance(value, Tensor) for value in values):
            torch._check(
                all(value.is_meta == params[0].is_meta for value in values),
                lambda: (
                    f"got a gradient or state on the meta device for parameters on "
                    f"{params[0].device}; bring it back before the step"
                ),
            )


for name in _KERNELS:
    torch.library.register_fake(f"came8bit::{name}", _step_fake, lib=_library)


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
PASSES: dict[Any, tuple[Any, ...]] = {
    getattr(torch.ops.came8bit, f"{kind}_step_").default: tuple(
        getattr(torch.ops.came8bit, f"{kind}_{name}_").default for name in reference.PASSES
    )
    for kind in _STATE
}
"""The passes of each kind of step."""

BY_REFERENCE: dict[Any, Callable[..., None]] = {
    getattr(torch.ops.came8bit, name).default: run for name, run in _KERNELS.items()
}
"""The same operators by the reference, whatever library is loaded."""
quantize_blockwise = torch.ops.came8bit.quantize_blockwise.default
dequantize_blockwise = torch.ops.came8bit.dequantize_blockwise.default
