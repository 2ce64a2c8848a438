"""Columns whose gradients stop, and columns that never had any, on every rung over a long run.

    python -m benchmarks.dead_columns

A 64 x 256 matrix, Gaussian gradients of many sizes; a quarter of the columns stops after 500 steps,
a fifth never begins. RMS over the learning rate: what the stopped ones move by after that, and in
the last nine tenths of the run; the largest value of those that never begin; RMS of the live ones.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from came8bit import CAME
from came8bit.state.layout import OPTIM_BITS

LR, STOP = 1e-3, 500
STOPPED, LIVE, NEVER = slice(0, 64), slice(64, 205), slice(205, 256)


def travel(bits: int, steps: int, nesterov: bool, dtype: torch.dtype) -> dict[str, float]:
    """Return the figures of one run."""
    generator = torch.Generator().manual_seed(0)
    param = torch.zeros(64, 256, dtype=dtype, requires_grad=True)
    options = dict(optim_bits=bits, min_8bit_size=0, bias_correction=True, nesterov=nesterov)
    optimizer = CAME([param], lr=LR, **options)  # type: ignore[arg-type]
    size = torch.exp(torch.linspace(-2, 2, 256))
    at: dict[int, Tensor] = {}
    for t in range(steps):
        if t in (STOP, steps // 10):
            at[t] = param.detach().float().clone()
        grad = torch.randn(64, 256, generator=generator) * size
        grad[:, NEVER] = 0
        if t >= STOP:
            grad[:, STOPPED] = 0
        param.grad = grad.to(dtype)
        optimizer.step()
    end = param.detach().float()

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item() / LR

    return {
        "moves on by": rms((end - at[STOP])[:, STOPPED]),
        "of that late": rms((end - at[steps // 10])[:, STOPPED]),
        "never begun": end[:, NEVER].abs().max().item() / LR,
        "live": rms(end[:, LIVE]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="more than 5,000")
    steps = parser.parse_args().steps
    if steps <= 10 * STOP:
        parser.error(f"got --steps {steps}, expected more than {10 * STOP}")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for nesterov in (False, True):
            print(f"{dtype}, nesterov={nesterov}")
            for bits in OPTIM_BITS:
                figures = travel(bits, steps, nesterov, dtype)
                shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
                print(f"  {bits:2} bits: {shown}", flush=True)


if __name__ == "__main__":
    main()
