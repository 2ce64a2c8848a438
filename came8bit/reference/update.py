"""The executable specification of the update rule, in plain PyTorch.

Read it beside ``docs/internals/algorithm.md`` and ``csrc/update.h``: same passes, same symbols,
same order of operations. It is also what runs where no kernel does. Only add, subtract, multiply,
divide and square root of fp32 values appear, one rounding each, so compiled code can be equal to
the last bit.

A parameter is a batch of ``b`` matrices of ``n`` rows and ``k`` columns in its row-major order:
``g`` gradient, ``r, c`` second moment (row, column), ``R, C`` instability, ``m`` momentum,
``u`` preconditioned gradient, ``kappa`` the scale that clips ``u``, ``w`` its part of the momentum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .reduction import Tree
from .rounding import fp32, random_bits, round_stochastic, square_root
from .rungs import Momentum


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one call; every float is rounded to fp32 where it is used."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    eps1: float
    eps2: float
    clip_threshold: float
    weight_decay: float
    lr_tensor: Tensor | None = None
    stochastic: bool = True
    cautious: bool = False
    propagate: bool = False
    maximize: bool = False
    bias_correction: bool = False
    nesterov: bool = False
    seed: int = 0

    def lr_and_shrink(self) -> tuple[float, float]:
        """Return ``(lr, lr*weight_decay)`` in fp32.

        A float ``lr`` is multiplied in float64 and rounded once; a tensor is rounded to fp32 first
        and multiplied in fp32.
        """
        if self.lr_tensor is None:
            return fp32(self.lr), fp32(self.lr * self.weight_decay)
        lr = self.lr_tensor.detach().to("cpu", torch.float32)
        return lr.item(), (lr * fp32(self.weight_decay)).item()

    def correction(self, beta: float, step: int) -> float:
        """Return ``1 - beta**step`` (1 if not corrected), formed in float64 and rounded once."""
        return fp32(1.0 - beta**step) if self.bias_correction else 1.0

    def direction_correction(self, step: int) -> float:
        """Sum of the weights of all gradients so far in the direction of the update."""
        return self.correction(self.beta1, step + 1 if self.nesterov else step)

    def spent(self, step: int) -> float:
        """Return the weight that future steps would give momentum, relative to this update.

        ``beta1 + beta1**2 + ... = beta1/(1-beta1)``; a look-ahead has the first of these behind it.
        Divided by no bias correction, so the one in the scale is taken back; formed in float64.
        """
        rest = (self.beta1 * self.beta1 if self.nesterov else self.beta1) / (1.0 - self.beta1)
        steps = step + 1 if self.nesterov else step
        return fp32(rest * (1.0 - self.beta1**steps) if self.bias_correction else rest)


# --- the rule, pass by pass -----------------------------------------------------------------------


def ema(old: Tensor, beta: float, new: Tensor) -> Tensor:
    """Return ``beta*old + (1-beta)*new``."""
    return old * fp32(beta) + new * fp32(1.0 - beta)


def mean_square(total: Tensor, count: int, eps1: float) -> Tensor:
    """Return the mean of ``g**2 + eps1`` from the sum of ``g**2``."""
    return total / fp32(count) + fp32(eps1)


def row_factor(r: Tensor, mean: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``scale * sqrt(mean(r) / r_i)`` for ``r`` of ``(b, n)``; two roots cannot overflow."""
    return (square_root(mean.unsqueeze(-1)) / square_root(r)) * scale


def column_factor(c: Tensor, correction: float) -> Tensor:
    """Return ``1 / sqrt(c_j / correction)``."""
    return 1.0 / square_root(c / correction)


def clip_scale(rms: Tensor, clip_threshold: float) -> Tensor:
    """Return ``kappa = 1 / max(1, RMS(u) / clip_threshold)``."""
    ratio = rms / fp32(clip_threshold)
    return torch.where(ratio > 1, 1.0 / ratio, 1.0)


def root_mean(total: Tensor, count: int) -> Tensor:
    """Return ``sqrt(total / count)``."""
    return square_root(total / fp32(count))


def predicted_square(
    total: Tensor, row_ratio: Tensor, col_ratio: Tensor, mean: Tensor, correction: float
) -> Tensor:
    """Return the sum of ``u**2`` of a matrix whose ``g**2`` is the product of row and column sums.

    Known before the second sweep, and off by a factor that hardly changes from step to step.

    Args:
        total: sum of ``g**2``, of each matrix, as all others.
        row_ratio, col_ratio: sums of ``row_sum/r`` and of ``col_sum/c``.
        mean: of ``r``.
        correction: of ``c``.
    """
    predicted = ((row_ratio * mean) / total) * (col_ratio * correction)
    return torch.where(total > 0, predicted, 0.0)


def next_rms_ratio(rms: Tensor, predicted: Tensor) -> Tensor:
    """Return measured over predicted RMS, the factor for the next step; 1 if undefined."""
    ratio = rms / predicted
    return torch.where((ratio > 0) & (ratio < math.inf), ratio, 1.0)


def mean_instability(
    d2: Tensor, ud: Tensor, u2: Tensor, delta: Tensor, count: int, beta1: float, eps2: float
) -> Tensor:
    """Return the mean of ``(kappa*u - m_t)**2 + eps2`` from sums around ``kappa_0``.

    ``kappa*u - m_t = beta1*(kappa*u - m)``. With ``d = kappa_0*u - m`` and
    ``delta = kappa - kappa_0`` its square is ``beta1**2 * (d**2 + 2*delta*u*d + delta**2*u**2)``,
    without cancellation while ``delta`` is small.
    """
    square = ((d2 + ud * (delta * 2.0)) + u2 * (delta * delta)) / fp32(count)
    square = torch.where(square < 0, 0.0, square)
    return square * fp32(beta1 * beta1) + fp32(eps2)


def gain(kappa: Tensor, beta1: float) -> Tensor:
    """Return ``kappa*(1-beta1)``: what ``u`` is multiplied by on its way into the momentum."""
    return kappa * fp32(1.0 - beta1)


def momentum(decayed: Tensor, w: Tensor) -> Tensor:
    """Return ``m_t = beta1*m + w``, where ``w = gain*u``."""
    return decayed + w


def look_ahead(m: Tensor, w: Tensor, beta1: float) -> Tensor:
    """Return Nesterov's direction ``beta1*m_t + w`` (Dozat, 2016), one decay ahead."""
    return m * fp32(beta1) + w


def spend(direction: Tensor, m: Tensor, remembered: Tensor, rest: float) -> Tensor:
    """Return ``direction + (m_t - remembered)*rest``: what the code forgets acts now."""
    return direction + (m - remembered) * rest


def agrees(m: Tensor, w: Tensor) -> Tensor:
    """Return the cautious mask (arXiv 2411.16085): momentum and gradient have one strict sign."""
    return ((m > 0) & (w > 0)) | ((m < 0) & (w < 0))


def cautious_scale(agreeing: Tensor, count: int) -> Tensor:
    """Return ``1 / max(agreeing/count, 0.001)``."""
    fraction = agreeing.to(torch.float32) / fp32(count)
    return 1.0 / torch.where(fraction < fp32(1e-3), fp32(1e-3), fraction)


# --- one parameter --------------------------------------------------------------------------------

SCALARS = 4
"""Values of a parameter that stay between its passes: left out?, kappa_0, predicted RMS, kappa."""


@dataclass(kw_only=True, eq=False)
class Step:
    """What both kinds of step share.

    Attributes:
        param, grad: fp32, bf16 or fp16 of one shape, any strides.
        exp_avg: momentum, fp32, or codes with ``absmax``.
        step, skipped: int64 0-d counters.
        index, offset: of the parameter, and of its first element in the full parameter.
        numel: elements of the full parameter.
        rows: of the full parameter, if its rows are on several ranks; else 0.
        work: fp32, for what stays here between the passes; begins with ``scalars``.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    absmax: Tensor | None = None
    step: Tensor
    skipped: Tensor
    index: int
    offset: int
    numel: int
    rows: int
    hyper: Hyper
    tree: Tree
    work: Tensor

    def __post_init__(self) -> None:
        self.param, self.grad = self.param.detach(), self.grad.detach()
        self.held = Momentum(self.exp_avg, self.absmax, self.param.shape)
        self.scalars = self.work[:SCALARS]

    @property
    def left(self) -> bool:
        """Whether the parameter is left out of the step."""
        return bool(self.scalars[0])

    def _leave_if_not_finite(self, total: Tensor) -> bool:
        """Leave the parameter out, and count that, if ``total`` is not finite."""
        left = not (self.hyper.propagate or bool(total.isfinite()))
        self.scalars[0] = float(left)
        if left:
            self.skipped += 1
        return left

    def _clip(self, total_u2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the RMS of ``u`` and note kappa, which is returned as well."""
        rms = root_mean(total_u2, self.numel)
        kappa = clip_scale(rms, self.hyper.clip_threshold)
        self.scalars[3] = kappa
        return rms, kappa

    def _finish(
        self,
        m_t: Tensor,
        w: Tensor,
        idle: Tensor,
        agreeing: Tensor | None,
        row_mean: tuple[Tensor, Tensor] | None = None,
        col: Tensor | None = None,
    ) -> None:
        """Scale the direction by learning rate, bias correction, confidence and mask; apply it.

        Args:
            m_t: the new momentum.
            w: its new part.
            idle: where the update is exactly zero.
            agreeing: how many elements the cautious mask keeps.
            row_mean, col: instability of the rows with its mean, and the factor of the columns.
        """
        hyper, t = self.hyper, int(self.step)
        coded, remembered = self.held.encode(m_t, idle)
        lr, shrink = hyper.lr_and_shrink()
        scale: Tensor = torch.tensor(lr) / torch.tensor(hyper.direction_correction(t))
        scale = scale.to(m_t.device)
        if agreeing is not None:
            scale = scale * cautious_scale(agreeing, self.numel)
        direction = look_ahead(m_t, w, hyper.beta1) if hyper.nesterov else m_t
        if remembered is not None:
            direction = spend(direction, m_t, remembered.view(m_t.shape), hyper.spent(t))
        if row_mean is None or col is None:
            update = direction * scale
        else:
            row = row_factor(*row_mean, 1.0)
            update = (direction * (row * scale).unsqueeze(-1)) * col.unsqueeze(-2)
        if agreeing is not None:
            update = torch.where(agrees(m_t, w), update, 0.0)
        self._apply(update.reshape(-1), shrink, t)
        self.held.store(coded)

    def _apply(self, update: Tensor, shrink: float, step: int) -> None:
        """Do ``p <- round((p - p*shrink) - update)``: fp32 inside, one rounding to the dtype of p.

        Not ``p*(1 - shrink)``: 1 - 1e-6 in fp32 is off by 3 % of the 1e-6, in the same direction at
        every step.
        """
        p = self.param.reshape(-1).to(torch.float32)
        value = (p - p * shrink) - update
        if self.hyper.stochastic and self.param.dtype != torch.float32:
            bits = random_bits(
                value.numel(),
                seed=self.hyper.seed,
                index=self.index,
                step=step,
                offset=self.offset,
                device=value.device,
            )
            value = round_stochastic(value, self.param.dtype, bits)
        self.param.copy_(value.view(self.param.shape))
