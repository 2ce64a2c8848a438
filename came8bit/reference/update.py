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

from .reduction import CPU_TREE, Tree
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


def row_factor(r: Tensor, scale: float | Tensor, tree: Tree) -> Tensor:
    """Return ``scale * sqrt(mean(r) / r_i)`` for ``r`` of ``(b, n)``; two roots cannot overflow."""
    mean = (tree.vector(r) / fp32(r.shape[-1])).unsqueeze(-1)
    return (square_root(mean) / square_root(r)) * scale


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


def predicted_rms(
    row_sum: Tensor,
    col_sum: Tensor,
    r: Tensor,
    c: Tensor,
    correction: float,
    count: int,
    tree: Tree,
) -> Tensor:
    """Return the RMS of ``u`` if every ``g**2`` were the product of its row and column sums.

    Known before the second sweep, and off by a factor that hardly changes from step to step.
    """
    mean = tree.vector(r) / fp32(r.shape[-1])
    rows = tree.vector(row_sum / r) * mean
    cols = tree.vector(col_sum / c) * correction
    total = tree.vector(row_sum)
    predicted = torch.where(total > 0, (rows / total) * cols, 0.0)
    return root_mean(tree.matrices(predicted), count)


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


def cautious_scale(mask: Tensor) -> Tensor:
    """Return ``1 / max(mean(mask), 0.001)``."""
    fraction = mask.sum().to(torch.float32) / fp32(mask.numel())
    return 1.0 / torch.where(fraction < fp32(1e-3), fp32(1e-3), fraction)


# --- one parameter --------------------------------------------------------------------------------


def apply_(
    param: Tensor,
    update: Tensor,
    shrink: float,
    index: int,
    offset: int,
    step: int,
    hyper: Hyper,
) -> None:
    """Do ``p <- round((p - p*shrink) - update)``: fp32 inside, one rounding to the dtype of p.

    Not ``p*(1 - shrink)``: 1 - 1e-6 in fp32 is off by 3 % of the 1e-6, in the same direction at
    every step.
    """
    p = param.detach().reshape(-1).to(torch.float32)
    value = (p - p * shrink) - update.reshape(-1)
    if hyper.stochastic and param.dtype != torch.float32:
        bits = random_bits(
            value.numel(),
            seed=hyper.seed,
            index=index,
            step=step,
            offset=offset,
            device=value.device,
        )
        value = round_stochastic(value, param.dtype, bits)
    param.detach().copy_(value.view(param.shape))


def _finish(
    param: Tensor,
    m_t: Tensor,
    remembered: Tensor | None,
    w: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    index: int,
    offset: int,
    step: int,
    hyper: Hyper,
) -> None:
    """Scale the direction by learning rate, bias correction, confidence and mask, and apply it."""
    lr, shrink = hyper.lr_and_shrink()
    scale: Tensor = torch.tensor(lr) / torch.tensor(hyper.direction_correction(step))
    scale = scale.to(m_t.device)
    if hyper.cautious:
        mask = agrees(m_t, w)
        scale = scale * cautious_scale(mask)
    direction = look_ahead(m_t, w, hyper.beta1) if hyper.nesterov else m_t
    if remembered is not None:
        direction = spend(direction, m_t, remembered.view(m_t.shape), hyper.spent(step))
    if row is None or col is None:
        update = direction * scale
    else:
        update = (direction * (row * scale).unsqueeze(-1)) * col.unsqueeze(-2)
    if hyper.cautious:
        update = torch.where(mask, update, 0.0)
    apply_(param, update, shrink, index, offset, step, hyper)


def factored_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    absmax: Tensor | None,
    exp_avg_sq_row: Tensor,
    exp_avg_sq_col: Tensor,
    exp_avg_res_row: Tensor,
    exp_avg_res_col: Tensor,
    rms_ratio: Tensor,
    step: Tensor,
    skipped: Tensor,
    index: int,
    offset: int,
    hyper: Hyper,
    tree: Tree = CPU_TREE,
) -> Tensor:
    """Take a CAME step of a parameter seen as matrices; update all tensors but ``grad`` in place.

    Args:
        param, grad: fp32, bf16 or fp16 of one shape, any strides.
        exp_avg: momentum, fp32, or int8 codes with ``absmax``.
        exp_avg_sq_row, exp_avg_res_row: fp32 ``(b, n)``.
        exp_avg_sq_col, exp_avg_res_col: fp32 ``(b, k)``.
        rms_ratio: fp32 0-d, :func:`next_rms_ratio` of the previous step (1 at first).
        step, skipped: int64 0-d counters.
        index, offset: of the parameter, and of its first element in the full parameter.
        hyper: hyper-parameters.
        tree: the order of sums; kernels of one kind of device have one.

    Returns:
        The sum of ``grad**2``, fp32 0-d.
    """
    t = int(step) + 1
    b, n = exp_avg_sq_row.shape
    k = exp_avg_sq_col.shape[1]
    g = grad.detach().reshape(b, n, k).to(torch.float32)

    g2 = g * g
    row_sum, col_sum = tree.rows(g2), tree.columns(g2)
    total_g2 = tree.total_of_rows(row_sum)
    if not (hyper.propagate or bool(total_g2.isfinite())):
        skipped += 1
        return total_g2
    r = ema(exp_avg_sq_row, hyper.beta2, mean_square(row_sum, k, hyper.eps1))
    c = ema(exp_avg_sq_col, hyper.beta2, mean_square(col_sum, n, hyper.eps1))

    correction = hyper.correction(hyper.beta2, t)
    a = row_factor(r, -1.0 if hyper.maximize else 1.0, tree)
    c_factor = column_factor(c, correction)
    predicted = predicted_rms(row_sum, col_sum, r, c, correction, b * n * k, tree)
    kappa_0 = clip_scale(rms_ratio * predicted, hyper.clip_threshold)

    u = (g * a.unsqueeze(-1)) * c_factor.unsqueeze(-2)
    held = Momentum(exp_avg, absmax, param.shape)
    m = held.load().view(b, n, k)
    d = u * kappa_0 - m
    u2 = u * u
    sums = [(tree.rows(x), tree.columns(x)) for x in (d * d, u * d, u2)]
    total_u2 = tree.total(u2)
    if not (hyper.propagate or bool(total_u2.isfinite())):
        skipped += 1
        return total_g2
    rms = root_mean(total_u2, b * n * k)
    kappa = clip_scale(rms, hyper.clip_threshold)
    delta = kappa - kappa_0
    (d2_row, d2_col), (ud_row, ud_col), (u2_row, u2_col) = sums
    s_row = mean_instability(d2_row, ud_row, u2_row, delta, k, hyper.beta1, hyper.eps2)
    s_col = mean_instability(d2_col, ud_col, u2_col, delta, n, hyper.beta1, hyper.eps2)
    res_row = ema(exp_avg_res_row, hyper.beta3, s_row)
    res_col = ema(exp_avg_res_col, hyper.beta3, s_col)

    # w = gain*u, with the gain multiplied into the row factor.
    w = (g * (a * gain(kappa, hyper.beta1)).unsqueeze(-1)) * c_factor.unsqueeze(-2)
    m_t = momentum(held.decayed(hyper.beta1).view(b, n, k), w)
    coded, remembered = held.encode(m_t, w == 0)
    row = row_factor(res_row, 1.0, tree)
    col = column_factor(res_col, hyper.correction(hyper.beta3, t))
    _finish(param, m_t, remembered, w, row, col, index, offset, t, hyper)

    held.store(coded)
    exp_avg_sq_row.copy_(r)
    exp_avg_sq_col.copy_(c)
    exp_avg_res_row.copy_(res_row)
    exp_avg_res_col.copy_(res_col)
    rms_ratio.copy_(next_rms_ratio(rms, predicted))
    step += 1
    return total_g2


def unfactored_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    absmax: Tensor | None,
    exp_avg_sq: Tensor,
    step: Tensor,
    skipped: Tensor,
    index: int,
    offset: int,
    hyper: Hyper,
    tree: Tree = CPU_TREE,
) -> Tensor:
    """Take a CAME step with a full second moment and no confidence term (0-D, 1-D, narrow).

    Args:
        exp_avg_sq: fp32 of the parameter's shape, contiguous.
        exp_avg, absmax, step, skipped, index, offset, hyper, tree, param, grad: as in
            :func:`factored_step_`.

    Returns:
        As :func:`factored_step_`.
    """
    t = int(step) + 1
    g = grad.detach().reshape(-1).to(torch.float32)
    g2 = g * g
    total_g2 = tree.flat(g2)
    if not (hyper.propagate or bool(total_g2.isfinite())):
        skipped += 1
        return total_g2
    v = ema(exp_avg_sq.view(-1), hyper.beta2, g2 + fp32(hyper.eps1))
    sign = -1.0 if hyper.maximize else 1.0
    u = (g * sign) / square_root(v / hyper.correction(hyper.beta2, t))
    total_u2 = tree.flat(u * u)
    if not (hyper.propagate or bool(total_u2.isfinite())):
        skipped += 1
        return total_g2
    kappa = clip_scale(root_mean(total_u2, g.numel()), hyper.clip_threshold)
    w = u * gain(kappa, hyper.beta1)
    held = Momentum(exp_avg, absmax, param.shape)
    m_t = momentum(held.decayed(hyper.beta1).view(-1), w)
    coded, remembered = held.encode(m_t, g == 0)
    _finish(param, m_t, remembered, w, None, None, index, offset, t, hyper)
    held.store(coded)
    exp_avg_sq.copy_(v.view(exp_avg_sq.shape))
    step += 1
    return total_g2
