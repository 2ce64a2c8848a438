"""How far three ways to accumulate the instability are from float64, in one table.

    python -m benchmarks.exactness

The instability is summed before the clip scale is known, around an expected one, ``kappa_0``
(``docs/internals/algorithm.md``). Compared are ``kappa_0`` = 0 (the plain expansion), the
scale of the previous step, and the predicted one that the package uses; beside them the direct
evaluation by ``came-pytorch`` in fp32, if it is installed.

Errors are against the rule in float64 after 100 steps on a 128 x 96 matrix: the worst relative
error of an element of R and C, and the error of the parameter as a part of the distance travelled.
Gradients are a fixed one plus relative noise; with spikes every 17th is multiplied by 1000. With
beta3 = 0.5 the statistics see recent steps only, where momentum has caught up and the difference
that is squared is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from came8bit import reference
from came8bit.reference import passes
from came8bit.state import store as dense
from came8bit.state.layout import plan

SHAPE, STEPS, LR, DECAY = (128, 96), 100, 1e-4, 0.01
BETA1, BETA2, EPS = 0.9, 0.999, (1e-30, 1e-16)

Result = tuple[Tensor, list[Tensor]]
"""Parameter, and the four statistics flattened."""


def gradients(noise: float, spikes: bool) -> tuple[Tensor, list[Tensor]]:
    """Start of the parameter and all gradients, fp32."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SHAPE, generator=generator) * 0.02
    fixed = torch.randn(SHAPE, generator=generator) * torch.rand(SHAPE[1], generator=generator)
    grads = []
    for t in range(STEPS):
        g = fixed + noise * torch.randn(SHAPE, generator=generator)
        grads.append(g * (1000.0 if spikes and t % 17 == 5 else 1.0))
    return start, grads


def in_float64(start: Tensor, grads: list[Tensor], beta3: float) -> Result:
    """Evaluate the definition as it is written."""
    p = start.double()
    m = torch.zeros_like(p)
    r, c = torch.zeros(SHAPE[0]).double(), torch.zeros(SHAPE[1]).double()
    big_r, big_c = r.clone(), c.clone()
    for g in (grad.double() for grad in grads):
        g2 = g * g + EPS[0]
        r = BETA2 * r + (1 - BETA2) * g2.mean(1)
        c = BETA2 * c + (1 - BETA2) * g2.mean(0)
        u = g * (r.mean() / r).sqrt()[:, None] / c.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = BETA1 * m + (1 - BETA1) * u
        s2 = (u - m).square() + EPS[1]
        big_r = beta3 * big_r + (1 - beta3) * s2.mean(1)
        big_c = beta3 * big_c + (1 - beta3) * s2.mean(0)
        confidence = (big_r.mean() / big_r).sqrt()[:, None] / big_c.sqrt()
        p = p * (1 - LR * DECAY) - LR * m * confidence
    return p, [r, c, big_r, big_c]


@contextmanager
def expected(scale: Callable[..., Tensor] | None) -> Iterator[None]:
    """Let the reference expect another sum of squares, and with it another clip scale."""
    original = passes.predicted_square
    passes.predicted_square = scale or original
    try:
        yield
    finally:
        passes.predicted_square = original


# rms_ratio becomes measured / predicted: with 1 predicted it carries the previous RMS, and with an
# infinite prediction the expected scale is 0.
WAYS: dict[str, Callable[..., Tensor] | None] = {
    "kappa_0 = 0": lambda *_: torch.tensor([math.inf]),
    "previous scale": lambda *_: torch.tensor([float(math.prod(SHAPE))]),
    "predicted scale": None,
}


def by_reference(start: Tensor, grads: list[Tensor], beta3: float, way: str) -> Result:
    """Step the executable specification with one of :data:`WAYS`."""
    layout = plan(SHAPE, optim_bits=32)
    state = dense.allocate(layout, start.device)
    hyper = reference.Hyper(LR, BETA1, BETA2, beta3, *EPS, 1.0, DECAY)
    param = start.clone()
    with expected(WAYS[way]):
        for g in grads:
            reference.factored_step_(param=param, grad=g, **state, index=0, offset=0, hyper=hyper)
    names = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
    return param, [state[name].flatten() for name in names]


def by_official(start: Tensor, grads: list[Tensor], beta3: float) -> Result | None:
    """``came-pytorch`` in fp32, or ``None`` if it is not installed."""
    try:
        from came_pytorch import CAME
    except ImportError:
        return None
    param = start.clone().requires_grad_()
    betas = (BETA1, BETA2, beta3)
    optimizer = CAME([param], lr=LR, betas=betas, eps=EPS, weight_decay=DECAY)
    for g in grads:
        param.grad = g.clone()
        optimizer.step()
    state = optimizer.state[param]
    names = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
    return param.detach(), [state[name] for name in names]


def errors(result: Result | None, exact: Result, start: Tensor) -> tuple[str, str]:
    """Worst relative error of R and C, and error of the parameter over the distance travelled."""
    if result is None:
        return "not installed", "not installed"
    worst = max(
        ((x.double() - y).abs() / y).max().item()
        for x, y in zip(result[1][2:], exact[1][2:], strict=True)
    )
    distance = ((result[0].double() - exact[0]).norm() / (exact[0] - start).norm()).item()
    return f"{worst:.0e}", f"{distance:.0e}"


def main() -> None:
    """Print the table."""
    names = [*WAYS, "came-pytorch"]
    print("| beta3 | noise | spikes | R, C: " + " | ".join(names), end=" | ")
    print("distance: " + " | ".join(names) + " |")
    print("|---" * (3 + 2 * len(names)) + "|")
    for beta3 in (0.9999, 0.5):
        for noise in (1.0, 0.1, 0.001):
            for spikes in (False, True):
                start, grads = gradients(noise, spikes)
                exact = in_float64(start, grads, beta3)
                results = [by_reference(start, grads, beta3, way) for way in WAYS]
                cells = [
                    errors(result, exact, start)
                    for result in (*results, by_official(start, grads, beta3))
                ]
                columns = [*(cell[0] for cell in cells), *(cell[1] for cell in cells)]
                case = f"| {beta3:g} | {noise:g} | {'yes' if spikes else 'no'} | "
                print(case + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
