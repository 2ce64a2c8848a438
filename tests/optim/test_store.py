"""The seam between the optimizer and what keeps its state."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from bytes_store import BytesStore

import came8bit
from came8bit import CAME8bit, PagedCAME8bit
from came8bit.paging.store import PagedStore
from came8bit.state.store import DenseStore, StateStore

SHAPES = [(40, 300), (7,), (64, 80)]


class Elsewhere(CAME8bit):
    """Differs by its store alone."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._store = BytesStore()


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, steps, first=0):
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t + 1)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def assert_same(one, other):
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    a, b = one.state_dict()["state"], other.state_dict()["state"]
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


@pytest.mark.parametrize("store", [DenseStore, PagedStore, BytesStore])
def test_every_store_has_the_whole_interface(store):
    wanted = {name for name in vars(StateStore) if not name.startswith("_")}
    assert wanted <= set(dir(store))


@pytest.mark.parametrize("cls", [PagedCAME8bit, Elsewhere])
def test_another_store_has_the_bits_of_the_dense_one(cls, monkeypatch):
    monkeypatch.setattr("came8bit.paging.pages.MIN_PAGE_BYTES", 0)
    dense, other = (make(parameters(), lr=0.01, min_8bit_size=0) for make in (CAME8bit, cls))
    train(dense, 3)
    train(other, 3)
    assert_same(dense, other)
    copied, pickled = deepcopy(other), pickle.loads(pickle.dumps(other))
    loaded = cls(parameters(), lr=1.0)
    loaded.load_state_dict(other.state_dict())
    for p, q in zip(*(o.param_groups[0]["params"] for o in (loaded, other)), strict=True):
        p.data.copy_(q.data)
    for optimizer in (dense, other, copied, pickled, loaded):
        train(optimizer, 2, first=3)
    for optimizer in (other, copied, pickled, loaded):
        assert_same(dense, optimizer)


def test_another_store_steps_in_backward():
    dense, other = (make(parameters(), lr=0.01, min_8bit_size=0) for make in (CAME8bit, Elsewhere))
    came8bit.step_in_backward(other)
    for t in range(3):
        for optimizer in (dense, other):
            params = optimizer.param_groups[0]["params"]
            generator = torch.Generator().manual_seed(t)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dense, other)


@pytest.mark.parametrize("name", ["optim_bits", "is_paged"])
def test_a_class_that_settles_an_option_takes_the_same_value_only(name):
    fixed = {"optim_bits": 8, "is_paged": True}[name]
    other = {"optim_bits": 32, "is_paged": False}[name]
    made = PagedCAME8bit(parameters(), **{name: fixed})
    assert made.param_groups[0]["optim_bits"] == 8
    with pytest.raises(
        ValueError, match=f"PagedCAME8bit: got {name}={other}, expected {fixed}; use CAME"
    ):
        PagedCAME8bit(parameters(), **{name: other})


def test_state_is_what_the_store_shows():
    optimizer = CAME8bit(parameters())
    assert optimizer.state is optimizer._store.state
    optimizer.state = optimizer.state
    train(optimizer, 1)
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
    assert "state" not in vars(optimizer)
