"""Small trained optimizers for the tests of checkpoints."""

import torch
from training import gradients, start

from came8bit import CAME8bit

SHAPES = {
    "embed": (64, 96),
    "bias": (7,),
    "scale": (),
    "column": (4096, 1),
    "conv": (16, 8, 3, 3),
    "experts": (4, 32, 40),
    "odd": (27, 153),  # 4131 codes: what follows is not aligned
}
"""All kinds of layouts: coded and not, factored in each view and not, below and above the limit."""


def parameters(shapes=SHAPES, dtype=torch.float32):
    """``{name: parameter}``; the same values every time."""
    return {
        name: start(shape, dtype, seed=seed) for seed, (name, shape) in enumerate(shapes.items())
    }


def train(params, optimizer, steps, first=0):
    """Steps with gradients that depend on the name and the step only."""
    for step in range(first, first + steps):
        for name, param in params.items():
            seed = 1000 * step + sum(map(ord, name))
            param.grad = next(gradients(param.shape, steps=1, seed=seed)).to(param.dtype)
        optimizer.step()


def trained(cls=CAME8bit, steps=3, shapes=SHAPES, dtype=torch.float32, **options):
    """``(params, optimizer)`` after some steps; the parameters have names."""
    params = parameters(shapes, dtype)
    optimizer = cls(params.items(), **{"lr": 1e-3, "weight_decay": 0.01, **options})
    train(params, optimizer, steps)
    return params, optimizer


def copies(params, order=None):
    """The model after its own checkpoint has been loaded; ``order`` reorders the parameters."""
    names = list(params) if order is None else order
    return {name: params[name].detach().clone().requires_grad_() for name in names}


def by_name(params, optimizer):
    """``{(name, buffer): tensor}`` of the whole state."""
    return {
        (name, buffer): tensor
        for name, param in params.items()
        for buffer, tensor in optimizer._store.read(param).items()
    }
