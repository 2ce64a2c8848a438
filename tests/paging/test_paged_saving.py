"""Paged state that is saved, loaded and copied."""

import copy
import io
import pickle

import pytest
import torch
from paged_training import PAIRS, SHAPES, complete, fresh, make, mapped, train
from training import assert_same, same_bits, start

from came8bit import CAME8bit, PagedCAME8bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("pair", PAIRS[:2])
def test_resume_is_bit_exact_and_the_target_decides_where(pair, source, target, dtype, tmp_path):
    unbroken = train(make(pair[source], dtype), 3)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    options = {"page_dir": tmp_path, "page_budget": 800_000} if target else {}
    resumed = fresh(unbroken, pair[target], **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert ("exp_avg" in resumed.state[resumed.param_groups[0]["params"][0]]) == (not target)
    assert len(list(tmp_path.iterdir())) == target
    assert_same(complete(unbroken), complete(resumed))
    train(unbroken, 2, first=3)
    train(resumed, 2, first=3)
    assert_same(complete(unbroken), complete(resumed))


def test_saved_layouts_win_over_those_that_are_there():
    source = make(CAME8bit, factored_view="last_two", min_8bit_size=10**9)
    train(source, 2)
    target = train(make(PagedCAME8bit, page_budget=1 << 20), 1)
    target.load_state_dict(source.state_dict())
    for p, q in zip(*(o.param_groups[0]["params"] for o in (target, source)), strict=True):
        p.data.copy_(q.data)
    assert_same(complete(source), complete(target))
    train(source, 2, first=2)
    train(target, 2, first=2)
    assert_same(complete(source), complete(target))


def test_state_dict_is_complete_ordinary_and_a_copy(tmp_path):
    paged = train(make(PagedCAME8bit, page_dir=tmp_path), 2)
    dense = train(make(CAME8bit), 2)
    given_dict, expected = paged.state_dict(), dense.state_dict()
    assert given_dict["param_groups"] == expected["param_groups"]
    assert mapped(tmp_path) == 0
    for index, state in expected["state"].items():
        assert list(state) == list(given_dict["state"][index])
        for name, value in state.items():
            got = given_dict["state"][index][name]
            assert same_bits(value, got)
            assert got.is_contiguous()
    kept = copy.deepcopy(given_dict)
    train(paged, 1, first=2)
    for index, state in kept["state"].items():
        for name, value in state.items():
            assert same_bits(value, given_dict["state"][index][name])


def test_loading_into_itself_and_shrinking():
    optimizer = train(make(PagedCAME8bit), 2)
    before = complete(optimizer)
    state_dict = optimizer.state_dict()
    train(optimizer, 1, first=2)
    optimizer.load_state_dict(state_dict)
    for p, q in zip(optimizer.param_groups[0]["params"], before[0], strict=True):
        p.data.copy_(q)
    assert_same(before, complete(optimizer))
    state_dict["state"] = {0: state_dict["state"][0]}
    optimizer.load_state_dict(state_dict)
    assert len(optimizer.state) == len(optimizer._store.pager._pages) == 1
    train(optimizer, 1)
    state_dict["state"] = {}
    optimizer.load_state_dict(state_dict)
    assert not optimizer.state
    params = [start(shape, seed=i) for i, shape in enumerate(SHAPES)]
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q)
    train(optimizer, 2)
    assert_same(complete(train(make(CAME8bit), 2)), complete(optimizer))  # from zeros again


@pytest.mark.parametrize("broken", ["exp_avg", "absmax", "step"])
def test_refused_states_change_nothing(broken):
    state_dict = copy.deepcopy(train(make(PagedCAME8bit), 2).state_dict())
    state_dict["state"][6][broken] = torch.zeros(3)
    optimizer = train(make(PagedCAME8bit), 1)
    before = complete(optimizer)
    with pytest.raises(ValueError, match=r"parameter 6.*; nothing has been ch"):
        optimizer.load_state_dict(state_dict)
    assert_same(before, complete(optimizer))
    train(optimizer, 1, first=1)


def test_hooks_see_what_they_see_elsewhere():
    optimizer, calls = train(make(PagedCAME8bit), 1), []
    optimizer.register_state_dict_pre_hook(lambda *a: calls.append(("pre", len(a))))
    optimizer.register_state_dict_post_hook(
        lambda o, d: calls.append(("post", "exp_avg" in d["state"][0]))
    )
    optimizer.state_dict()
    optimizer.state_dict()
    assert calls == [("pre", 1), ("post", True)] * 2

    def failing(*_):
        raise KeyError("hook")

    handle = optimizer.register_state_dict_post_hook(failing)
    with pytest.raises(KeyError):
        optimizer.state_dict()
    handle.remove()
    assert "exp_avg" not in optimizer.state[optimizer.param_groups[0]["params"][0]]
    optimizer.state_dict()
    assert len(calls) == 8


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_pages_of_their_own(how, tmp_path):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=800_000), 2)
    other = how(optimizer)
    assert type(other) is PagedCAME8bit
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(complete(optimizer), complete(other))
    train(optimizer, 2, first=2)
    untouched = complete(train(make(CAME8bit), 2))
    assert_same(untouched, complete(other))
    train(other, 2, first=2)
    assert_same(complete(optimizer), complete(other))
    assert mapped(tmp_path) == 0


def test_a_model_and_its_optimizer_are_copied_together():
    model = torch.nn.Linear(300, 256)
    optimizer = PagedCAME8bit(model.parameters(), lr=1e-3)
    train(optimizer, 2)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    assert_same(complete(optimizer), complete(optimizer2))
    train(optimizer2, 1)
