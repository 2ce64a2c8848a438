"""Measure the size of updates: their RMS over lr, by step, for pure noise and a constant gradient.

    python -m benchmarks.update_size                 # docs/internals/algorithm.md

No model: a 64 x 64 matrix gets independent Gaussian gradients, or the same one at every step. What
the table shows is the rule alone. Prints Markdown; about a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from came8bit import CAME

SHAPE = (64, 64)
LR = 1e-4
STEPS = (1, 10, 100, 1000, 3000)

Rule = Callable[[torch.Tensor], torch.optim.Optimizer]


def rules() -> dict[str, Rule]:
    """Return the optimizers that are compared, by the name in the table."""

    def came(**options: object) -> Rule:
        return lambda param: CAME([param], lr=LR, min_8bit_size=0, **options)  # type: ignore[arg-type]

    corrected = {"bias_correction": True}
    return {
        "AdamW": lambda param: torch.optim.AdamW([param], lr=LR, weight_decay=0.0),
        "CAME as published": came(),
        "bias correction": came(**corrected),
        "bias correction, Nesterov": came(**corrected, nesterov=True),
        "the same, 8 bits": came(**corrected, nesterov=True, optim_bits=8),
        "the same, 4 bits": came(**corrected, nesterov=True, optim_bits=4),
        "the same, 2 bits": came(**corrected, nesterov=True, optim_bits=2),
        "the same, 0 bits": came(**corrected, nesterov=True, optim_bits=0),
        "bias correction, 2 bits": came(**corrected, optim_bits=2),
    }


def sizes(rule: Rule, steps: tuple[int, ...], *, constant: bool = False) -> dict[int, float]:
    """Return RMS(update) / lr at ``steps``; after the first ten, the mean square of five steps."""
    generator = torch.Generator().manual_seed(0)
    param = torch.zeros(SHAPE, requires_grad=True)
    optimizer = rule(param)
    fixed = torch.randn(SHAPE, generator=generator)
    squares: dict[int, list[float]] = {step: [] for step in steps}
    for t in range(1, max(steps) + 1):
        param.grad = fixed if constant else torch.randn(SHAPE, generator=generator)
        before = param.detach().clone()
        optimizer.step()
        square = (param.detach() - before).square().mean().item() / LR**2
        for step in steps:
            if step - (5 if step > 10 else 1) < t <= step:
                squares[step].append(square)
    return {step: (sum(found) / len(found)) ** 0.5 for step, found in squares.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=max(STEPS), help="leave out later columns")
    most = parser.parse_args().steps
    steps = tuple(step for step in STEPS if step <= most)
    torch.set_num_threads(1)
    print("| | " + " | ".join(f"step {step}" for step in steps) + " | constant gradient, last |")
    print("|---" * (len(steps) + 2) + "|")
    for name, rule in rules().items():
        noise = sizes(rule, steps)
        constant = sizes(rule, steps[-1:], constant=True)
        cells = [*noise.values(), *constant.values()]
        print(f"| {name} | " + " | ".join(f"{cell:.2g}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
