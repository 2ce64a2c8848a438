"""Optimizers with paged state, trained on random gradients."""

import errno
from contextlib import contextmanager

import pytest
import torch
from training import assert_same, gradients, snapshot, start

from came8bit import CAME, CAME8bit, CAME32bit, PagedCAME, PagedCAME8bit, PagedCAME32bit
from came8bit.paging.page_file import PageFile

# Pages, next to parameters that are too small for one, of every kind.
SHAPES = [(256, 300), (7,), (64, 96), (128, 64, 3, 3), (), (20000,), (3, 150, 180), (12000, 2)]
PAGED = {0, 3, 5, 6, 7}


def make(cls, dtype=torch.float32, shapes=SHAPES, **options):
    params = [start(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    return cls(params, **{"lr": 1e-3, "weight_decay": 0.01, **options})


def train(optimizer, steps, first=0, spoiled=(), left_out=()):
    for t in range(first, first + steps):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(params):
            g = next(gradients(p.shape, steps=1, seed=100 * t + index))
            p.grad = g.to(p.device, p.dtype)
            if (t, index) in spoiled:
                p.grad.view(-1)[-1] = torch.nan
            if (t, index) in left_out:
                p.grad = None
        optimizer.step()
    return optimizer


def complete(optimizer):
    """As :func:`training.snapshot`, with what is paged."""
    params, _, options = snapshot(optimizer)
    every = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, p in enumerate(every):
        state |= {(i, name): t.clone() for name, t in optimizer._store.read(p).items()}
    return params, state, options


def fresh(optimizer, cls=None, **options):
    params = [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]
    return (cls or type(optimizer))(params, **options)


@contextmanager
def unchanged(optimizer, error, message):
    """The block raises and says so, and parameters and state are what they were."""
    before = complete(optimizer)
    with pytest.raises(error, match=message) as caught:
        yield
    assert str(caught.value).count("Nothing has been changed") == 1
    assert "have been updated" not in str(caught.value)
    assert_same(before, complete(optimizer))


def refuse_a_window(patch, number):
    """The page file's window of this number, counted from now, cannot be had."""
    real, calls = PageFile.pieces, []

    def refuse(self, *arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(errno.ENOMEM, "no more")
        return real(self, *arguments)

    patch.setattr(PageFile, "pieces", refuse)


def page_file(directory):
    (path,) = directory.iterdir()
    return path


PAIRS = [(CAME8bit, PagedCAME8bit), (CAME, PagedCAME), (CAME32bit, PagedCAME32bit)]


def mapped(directory):
    """How many windows of page files in ``directory`` this process has."""
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum(str(directory) in line for line in file)
