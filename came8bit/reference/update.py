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

from .rounding import fp32, square_root


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
