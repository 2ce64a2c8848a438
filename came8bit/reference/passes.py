"""A step of one parameter, pass by pass, with the sums that stand between the passes.

A rank may hold only some rows of a parameter, its dimension 0 being sharded. What is summed over
all elements then goes through ``sums``, which are added over the ranks after each pass and handed
to the next as ``reduced``; row sums stay where the rows are. With the whole parameter at hand,
``sums`` are handed on as they are, and :func:`factored_step_` and :func:`unfactored_step_` do that.

``sums`` are float64, so that the order in which ranks are added makes no difference, and are
rounded to fp32 once after that. Of whole matrices (``rows`` 0) column sums need not be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .reduction import CPU_TREE, Tree
from .rounding import fp32, square_root
from .update import (
    SCALARS,
    Hyper,
    Step,
    agrees,
    clip_scale,
    column_factor,
    ema,
    gain,
    mean_instability,
    mean_square,
    momentum,
    next_rms_ratio,
    predicted_square,
    root_mean,
    row_factor,
)

PASSES = ("second_moment", "instability", "confidence", "apply")
"""In this order; after each but the last, ``sums`` are added over the ranks."""


def sums_sizes(columns: int, cautious: bool) -> tuple[int, int, int]:
    """Return how many sums each of the first three passes has.

    Args:
        columns: of a matrix whose rows are on several ranks; 0 for whole matrices, -1 for an
            unfactored parameter.
        cautious: whether the elements that agree have to be counted.
    """
    if columns > 0:
        return (3 + columns, 1 + 3 * columns, 1 + cautious)
    return (2 if columns == 0 else 1, 1, int(cautious))


def work_size(b: int, n: int, k: int) -> int:
    """Return how many fp32 values stay on a rank between the passes of ``b`` matrices."""
    return SCALARS + 5 * b * (n + k)


@dataclass(kw_only=True, eq=False)
class FactoredStep(Step):
    """A step of ``b`` matrices of ``n`` rows and ``k`` columns; ``b`` is 1 where rows are cut.

    Attributes:
        exp_avg_sq_row, exp_avg_res_row: fp32 ``(b, n)``.
        exp_avg_sq_col, exp_avg_res_col: fp32 ``(b, k)``.
        rms_ratio: fp32 0-d, :func:`~.update.next_rms_ratio` of the previous step (1 at first).
    """

    exp_avg_sq_row: Tensor
    exp_avg_sq_col: Tensor
    exp_avg_res_row: Tensor
    exp_avg_res_col: Tensor
    rms_ratio: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self.split = self.rows > 0
        self.sq_row, self.sq_col = self.exp_avg_sq_row, self.exp_avg_sq_col
        self.res_row, self.res_col = self.exp_avg_res_row, self.exp_avg_res_col
        (self.b, n), self.k = self.sq_row.shape, self.sq_col.shape[1]
        self.shape = (self.b, n, self.k)
        self.rows = self.rows or n
        of_rows, of_cols = self.work[SCALARS:].split([5 * self.b * n, 5 * self.b * self.k])
        self.r, self.row_factor, *self.row_sums = of_rows.view(5, self.b, n)
        self.c, self.col_factor, *self.col_sums = of_cols.view(5, self.b, self.k)

    def _gradient(self) -> Tensor:
        return self.grad.reshape(self.shape).to(torch.float32)

    def second_moment(self, sums: Tensor) -> None:
        """Take row and column sums of ``g**2``, and what the rows' second moments add up to."""
        g = self._gradient()
        g2 = g * g
        row_sum, col_sum = self.tree.rows(g2), self.tree.columns(g2)
        total = self.tree.total_of_rows(row_sum)
        self.r.copy_(
            ema(self.sq_row, self.hyper.beta2, mean_square(row_sum, self.k, self.hyper.eps1))
        )
        rows, r, ratio = (self.tree.vector(x) for x in (row_sum, self.r, row_sum / self.r))
        if self.split:
            _put(sums, rows, r, ratio, col_sum)
        else:
            _put(sums, total, self.tree.matrices(self._columns(rows, r, ratio, col_sum)))

    def _columns(self, total: Tensor, r: Tensor, row_ratio: Tensor, col_sum: Tensor) -> Tensor:
        """Make ``c`` and the factors of ``u``; return the squares predicted for each matrix."""
        hyper, mean = self.hyper, r / fp32(self.rows)
        self.c.copy_(ema(self.sq_col, hyper.beta2, mean_square(col_sum, self.rows, hyper.eps1)))
        correction = hyper.correction(hyper.beta2, int(self.step) + 1)
        self.row_factor.copy_(row_factor(self.r, mean, -1.0 if hyper.maximize else 1.0))
        self.col_factor.copy_(column_factor(self.c, correction))
        return predicted_square(
            total, row_ratio, self.tree.vector(col_sum / self.c), mean, correction
        )

    def instability(self, reduced: Tensor, sums: Tensor) -> None:
        """Take row and column sums of ``d**2, u*d, u**2`` with ``d = kappa_0*u - m``."""
        total, *rest = reduced.to(torch.float32).split([1, reduced.numel() - 1])
        if self._leave_if_not_finite(total):
            sums.zero_()
            return
        predicted = rest[0].squeeze()
        if self.split:
            r, row_ratio, col_sum = rest[0].split([1, 1, self.k])
            predicted = self.tree.matrices(self._columns(total, r, row_ratio, col_sum.view(1, -1)))
        predicted = root_mean(predicted, self.numel)
        kappa_0 = clip_scale(self.rms_ratio * predicted, self.hyper.clip_threshold)
        self.scalars[1], self.scalars[2] = kappa_0, predicted
        u = (self._gradient() * self.row_factor.unsqueeze(-1)) * self.col_factor.unsqueeze(-2)
        d = u * kappa_0 - self.held.load().view(self.shape)
        u2 = u * u
        for x, row, col in zip((d * d, u * d, u2), self.row_sums, self.col_sums, strict=True):
            row.copy_(self.tree.rows(x))
            col.copy_(self.tree.columns(x))
        _put(sums, self.tree.total(u2), *(self.col_sums if self.split else ()))

    def confidence(self, reduced: Tensor, sums: Tensor) -> None:
        """Make ``R`` and ``C``, write all statistics, count the step, and sum up what is left."""
        reduced = reduced.to(torch.float32)
        if self.left or self._leave_if_not_finite(reduced[0]):
            sums.zero_()
            return
        hyper = self.hyper
        rms, kappa = self._clip(reduced[0])
        delta = kappa - self.scalars[1]
        d2, ud, u2 = self.row_sums
        s_row = mean_instability(d2, ud, u2, delta, self.k, hyper.beta1, hyper.eps2)
        d2, ud, u2 = reduced[1:].view(3, 1, self.k) if self.split else self.col_sums
        s_col = mean_instability(d2, ud, u2, delta, self.rows, hyper.beta1, hyper.eps2)
        self.res_row.copy_(ema(self.res_row, hyper.beta3, s_row))
        self.res_col.copy_(ema(self.res_col, hyper.beta3, s_col))
        self.sq_row.copy_(self.r)
        self.sq_col.copy_(self.c)
        self.rms_ratio.copy_(next_rms_ratio(rms, self.scalars[2]))
        self.step += 1
        _put(
            sums,
            *([self.tree.vector(self.res_row)] if self.split else []),
            *([agrees(*self._momentum()).sum()] if hyper.cautious else []),
        )

    def _momentum(self) -> tuple[Tensor, Tensor]:
        """Return ``m_t`` and ``w = gain*u``, with the gain multiplied into the row factor."""
        factor = self.row_factor * gain(self.scalars[3], self.hyper.beta1)
        w = (self._gradient() * factor.unsqueeze(-1)) * self.col_factor.unsqueeze(-2)
        return momentum(self.held.decayed(self.hyper.beta1).view(self.shape), w), w

    def apply(self, reduced: Tensor) -> None:
        """Update the parameter, and code the momentum."""
        if self.left or not self.param.numel():
            return
        total = reduced[:1].to(torch.float32) if self.split else self.tree.vector(self.res_row)
        m_t, w = self._momentum()
        correction = self.hyper.correction(self.hyper.beta3, int(self.step))
        self._finish(
            m_t,
            w,
            w == 0,
            reduced[-1] if self.hyper.cautious else None,
            (self.res_row, total / fp32(self.rows)),
            column_factor(self.res_col, correction),
        )


@dataclass(kw_only=True, eq=False)
class UnfactoredStep(Step):
    """A step with a full second moment; ``exp_avg_sq`` is fp32 of the parameter's shape."""

    exp_avg_sq: Tensor

    def _gradient(self) -> Tensor:
        return self.grad.reshape(-1).to(torch.float32)

    def _second_moment(self) -> Tensor:
        g = self._gradient()
        return ema(self.exp_avg_sq.view(-1), self.hyper.beta2, g * g + fp32(self.hyper.eps1))

    def _direction(self, t: int) -> Tensor:
        """Return ``u`` of step ``t``."""
        sign = -1.0 if self.hyper.maximize else 1.0
        v = self._second_moment() / self.hyper.correction(self.hyper.beta2, t)
        return (self._gradient() * sign) / square_root(v)

    def second_moment(self, sums: Tensor) -> None:
        """Take the sum of ``g**2``."""
        g = self._gradient()
        _put(sums, self.tree.flat(g * g))

    def instability(self, reduced: Tensor, sums: Tensor) -> None:
        """Take the sum of ``u**2``."""
        if self._leave_if_not_finite(reduced[0].to(torch.float32)):
            sums.zero_()
            return
        u = self._direction(int(self.step) + 1)
        _put(sums, self.tree.flat(u * u))

    def confidence(self, reduced: Tensor, sums: Tensor) -> None:
        """Clip, count the step and the elements that agree."""
        if self.left or self._leave_if_not_finite(reduced[0].to(torch.float32)):
            sums.zero_()
            return
        self._clip(reduced[0].to(torch.float32))
        self.step += 1
        _put(sums, *([agrees(*self._momentum()).sum()] if self.hyper.cautious else []))

    def _momentum(self) -> tuple[Tensor, Tensor]:
        w = self._direction(int(self.step)) * gain(self.scalars[3], self.hyper.beta1)
        return momentum(self.held.decayed(self.hyper.beta1).view(-1), w), w

    def apply(self, reduced: Tensor) -> None:
        """Update the parameter, write the second moment, and code the momentum."""
        if self.left or not self.param.numel():
            return
        idle = self._gradient() == 0
        v = self._second_moment()
        self._finish(*self._momentum(), idle, reduced[-1] if self.hyper.cautious else None)
        self.exp_avg_sq.copy_(v.view(self.exp_avg_sq.shape))


def _put(sums: Tensor, *values: Tensor) -> None:
    """Write ``values``, one after another, which fill ``sums``."""
    if values:
        torch.cat([value.reshape(-1).to(torch.float64) for value in values], out=sums)


def _take(
    kind: type[FactoredStep | UnfactoredStep],
    shape: tuple[int, int, int],
    columns: int,
    hyper: Hyper,
    tree: Tree,
    operands: dict[str, Any],
) -> Tensor:
    """Run all passes over a parameter that is all here; return the sum of ``grad**2``."""
    param = operands["param"]
    work = torch.empty(work_size(*shape), dtype=torch.float32, device=param.device)
    step = kind(**operands, numel=param.numel(), rows=0, hyper=hyper, tree=tree, work=work)
    sizes = sums_sizes(columns, hyper.cautious)
    sums = [torch.empty(size, dtype=torch.float64, device=param.device) for size in sizes]
    step.second_moment(sums[0])
    for name, (before, after) in zip(PASSES[1:], pairwise(sums), strict=False):
        getattr(step, name)(before, after)
    step.apply(sums[-1])
    return sums[0][0].to(torch.float32)


def factored_step_(*, hyper: Hyper, tree: Tree = CPU_TREE, **operands: Any) -> Tensor:
    """Take a CAME step of a parameter seen as matrices; update all tensors but ``grad`` in place.

    Args:
        hyper: hyper-parameters.
        tree: the order of sums; kernels of one kind of device have one.
        operands: those of :class:`FactoredStep` that say nothing of ranks or passes.

    Returns:
        The sum of ``grad**2``, fp32 0-d.
    """
    shape = (*operands["exp_avg_sq_row"].shape, operands["exp_avg_sq_col"].shape[1])
    return _take(FactoredStep, shape, 0, hyper, tree, operands)


def unfactored_step_(*, hyper: Hyper, tree: Tree = CPU_TREE, **operands: Any) -> Tensor:
    """Take a CAME step with a full second moment and no confidence term (0-D, 1-D, narrow).

    Arguments are those of :func:`factored_step_`, operands those of :class:`UnfactoredStep`.
    """
    return _take(UnfactoredStep, (0, 0, 0), -1, hyper, tree, operands)
