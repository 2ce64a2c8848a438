"""The seam between the optimizer and what keeps its state."""

import pickle
from copy import deepcopy

import pytest
import torch
from bytes_store import BytesStore, Elsewhere
from paged_training import complete, fresh, make, train
from training import assert_same, parameter

import came8bit
from came8bit import CAME8bit, PagedCAME8bit
from came8bit.paging import PagedStore
from came8bit.state.store import DenseStore, StateStore

SHAPES = [(40, 300), (7,), (64, 80)]


@pytest.mark.parametrize("store", [DenseStore, PagedStore, BytesStore])
def test_every_store_has_the_whole_interface(store):
    wanted = {name for name in vars(StateStore) if not name.startswith("_")}
    assert wanted <= set(dir(store))


@pytest.mark.parametrize("cls", [PagedCAME8bit, Elsewhere])
def test_another_store_has_the_bits_of_the_dense_one(cls, monkeypatch):
    monkeypatch.setattr("came8bit.paging.pages.MIN_PAGE_BYTES", 0)
    dense, other = (train(make(c, shapes=SHAPES, min_8bit_size=0), 3) for c in (CAME8bit, cls))
    assert_same(complete(dense), complete(other))
    copied, pickled, loaded = deepcopy(other), pickle.loads(pickle.dumps(other)), fresh(other)
    loaded.load_state_dict(other.state_dict())
    train(dense, 2, first=3)
    for optimizer in (other, copied, pickled, loaded):
        assert_same(complete(dense), complete(train(optimizer, 2, first=3)))


def test_another_store_steps_in_backward():
    dense, other = (make(c, shapes=SHAPES, min_8bit_size=0) for c in (CAME8bit, Elsewhere))
    came8bit.step_in_backward(other)
    for t in range(3):
        for optimizer in (dense, other):
            params = optimizer.param_groups[0]["params"]
            generator = torch.Generator().manual_seed(t)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(complete(dense), complete(other))


@pytest.mark.parametrize("name", ["optim_bits", "is_paged"])
def test_a_class_that_settles_an_option_takes_the_same_value_only(name):
    fixed = {"optim_bits": 8, "is_paged": True}[name]
    other = {"optim_bits": 32, "is_paged": False}[name]
    made = PagedCAME8bit([parameter(3)], **{name: fixed})
    assert made.param_groups[0]["optim_bits"] == 8
    message = f"PagedCAME8bit: got {name}={other}, expected {fixed}; use CAME"
    with pytest.raises(ValueError, match=message):
        PagedCAME8bit([parameter(3)], **{name: other})
    with pytest.raises(ValueError, match=f"got {name}=tensor"):
        PagedCAME8bit([parameter(3)], **{name: torch.ones(3)})


def test_state_is_what_the_store_shows():
    optimizer = make(CAME8bit, shapes=SHAPES)
    assert optimizer.state is optimizer._store.state
    optimizer.state = optimizer.state
    train(optimizer, 1)
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
    assert "state" not in vars(optimizer)
