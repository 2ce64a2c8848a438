"""What the examples train on: token sequences that follow a rule, and a model that can learn it."""

import torch
from torch import Tensor, nn

TOKENS = 64


def make_model() -> nn.Module:
    """Return a model of 25 thousand parameters that predicts the next token."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(TOKENS, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, TOKENS)
    )


def batch(step: int, size: int = 16, length: int = 9) -> Tensor:
    """Return the tokens ``(size, length)`` of a step; each follows from the one before it."""
    tokens = [torch.randint(0, TOKENS, (size,), generator=torch.Generator().manual_seed(step))]
    while len(tokens) < length:
        tokens.append((5 * tokens[-1] + 3) % TOKENS)
    return torch.stack(tokens, dim=1)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross entropy of predicting each token from the one before it."""
    scores = model(tokens[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())
