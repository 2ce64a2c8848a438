"""Paged state on the CPU: the bits of the dense optimizer, whatever happens to it."""

import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_training import PAGED, PAIRS, SHAPES, complete, fresh, make, mapped, train
from training import assert_same, start

import came8bit
from came8bit import CAME, CAME8bit, PagedCAME8bit
from came8bit.paging import page_file as pagefile
from came8bit.paging import pages
from came8bit.paging.page_file import PageFile
from came8bit.paging.pager import Pager
from came8bit.paging.pages import PinnedMemory, Placement, default_budget
from came8bit.state.layout import plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dense", "cls"), PAIRS[:2])
def test_same_bits_as_dense(dense, cls, dtype, tmp_path):
    expected = train(make(dense, dtype), 4)
    for options in ({}, {"page_budget": 500_000, "page_dir": tmp_path}, {"page_budget": 1 << 30}):
        assert_same(complete(expected), complete(train(make(cls, dtype, **options), 4)))


OPTIONS = {
    "cautious": {"cautious": True},
    "maximize": {"maximize": True, "bias_correction": True},
    "official view": {"factored_view": "last_two"},
    "nearest": {"rounding": "nearest", "clip_threshold": 0.5},
    "tensor lr": {"lr": torch.tensor(1e-3)},
    "skip": {"nonfinite": "skip"},
    "propagate": {"nonfinite": "propagate"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_bits_with_every_option(options, dtype):
    options = OPTIONS[options]
    spoiled = {(1, 0), (2, 5), (2, 1)}
    expected = train(make(CAME8bit, dtype, **options), 4, spoiled=spoiled)
    got = train(make(PagedCAME8bit, dtype, **options, page_budget=450_000), 4, spoiled=spoiled)
    assert_same(complete(expected), complete(got))
    assert expected.skipped_steps() == got.skipped_steps()
    assert got.skipped_steps() == (0 if options.get("nonfinite") == "propagate" else 3)


@pytest.mark.parametrize("position", [0, 1, 3])
def test_raise_changes_nothing(position):
    optimizer = train(make(PagedCAME8bit, nonfinite="raise"), 2)
    before = complete(optimizer)
    with pytest.raises(FloatingPointError, match=f"gradient of parameter {position} "):
        train(optimizer, 1, first=2, spoiled={(2, position)})
    assert_same(before, complete(optimizer))
    dense = train(make(CAME8bit, nonfinite="raise"), 3)
    assert_same(complete(dense), complete(train(optimizer, 1, first=2)))


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 30), max_size=4).map(tuple), min_size=1, max_size=6),
    bits=st.sampled_from([32, 8, 4, 2, 0]),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_same_bits_for_any_shapes_budgets_and_missing_gradients(shapes, bits, dtype, share, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MIN_PAGE_BYTES", 1)
        found = [pages.page_layout(plan(s, optim_bits=bits, min_8bit_size=0)) for s in shapes]
        sizes = [page.nbytes for page in found if page is not None] or [1]
        budget = int(max(sizes) + share * (sum(sizes) - max(sizes)))
        places = st.tuples(st.integers(0, 3), st.integers(0, len(shapes) - 1))
        left_out = data.draw(st.sets(places))
        options = {"shapes": shapes, "optim_bits": bits, "min_8bit_size": 0}
        expected = train(make(CAME, dtype, **options), 4, left_out=left_out)
        paged = make(CAME, dtype, **options, is_paged=True, page_budget=budget)
        assert_same(complete(expected), complete(train(paged, 4, left_out=left_out)))


def test_same_bits_over_many_steps():
    shapes = [(96, 700), (300, 256), (50,)]
    expected = train(make(CAME8bit, torch.bfloat16, shapes), 150)
    got = train(make(PagedCAME8bit, torch.bfloat16, shapes, page_budget=100_000), 150)
    assert_same(complete(expected), complete(got))


def test_two_groups_and_one_that_comes_later():
    def grouped(cls, **options):
        params = [start(shape, seed=i) for i, shape in enumerate(SHAPES)]
        optimizer = cls(
            [{"params": params[:3], "optim_bits": 32}, {"params": params[3:6], "lr": 1e-2}],
            lr=1e-3,
            **options,
        )
        train(optimizer, 2)
        optimizer.add_param_group({"params": params[6:], "cautious": True})
        return train(optimizer, 2, first=2)

    expected, got = grouped(CAME8bit), grouped(PagedCAME8bit, page_budget=450_000)
    assert_same(complete(expected), complete(got))


# --- where things are -----------------------------------------------------------------------------


def test_only_what_is_small_stays(tmp_path):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    for index, p in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[p]
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert ("exp_avg" not in state) == (index in PAGED)
        if index in PAGED:
            assert not {"absmax", "exp_avg_sq"} & set(state)
            assert {"step", "skipped"} <= set(state)
    (file,) = tmp_path.iterdir()
    layouts = [pages.page_layout(plan(shape)) for shape in SHAPES]
    total = sum(page.nbytes for page in layouts if page is not None)
    assert total <= file.stat().st_size <= total + 4096 * (len(PAGED) + 1)
    assert file.stat().st_blocks * 512 >= total  # reserved, no holes
    assert mapped(tmp_path) == 0
    del optimizer
    assert not list(tmp_path.iterdir())


def test_windows_are_open_while_they_are_used_only(tmp_path, monkeypatch):
    seen = []
    real = came8bit.ops.step._call_operators

    def watched(group, squares, members):
        seen.append((mapped(tmp_path), sum("exp_avg_sq_row" in item.state for item in members)))
        real(group, squares, members)

    monkeypatch.setattr(came8bit.ops.step, "_call_operators", watched)
    train(make(PagedCAME8bit, page_dir=tmp_path, page_budget=400_000), 2)
    assert max(windows for windows, _ in seen) == 1
    assert mapped(tmp_path) == 0
    del seen[:]
    kept = make(PagedCAME8bit, page_dir=tmp_path, page_budget=1 << 30)
    train(kept, 2)
    assert max(windows for windows, _ in seen) == len(PAGED)
    assert mapped(tmp_path) == len(PAGED)  # all of it may stay
    kept.state_dict()
    assert mapped(tmp_path) < len(PAGED)
    train(kept, 1, first=2)
    assert_same(complete(train(make(CAME8bit), 3)), complete(kept))


def test_many_small_pages_need_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MIN_PAGE_BYTES", 0)
    shapes = [(20, 20)] * 300
    expected = train(make(CAME8bit, shapes=shapes, min_8bit_size=0), 2)
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    optimizer = make(PagedCAME8bit, shapes=shapes, min_8bit_size=0, page_budget=1 << 30)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 140, kept[1]))
    try:
        train(optimizer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
    assert_same(complete(expected), complete(optimizer))


def test_state_that_is_not_complete_is_refused():
    optimizer = train(make(PagedCAME8bit), 1)
    for cls in (CAME8bit, PagedCAME8bit):
        other = fresh(optimizer, cls)
        for p, q in zip(*(o.param_groups[0]["params"] for o in (other, optimizer)), strict=True):
            other.state[p] = dict(optimizer.state[q])
        with pytest.raises(ValueError, match=r"parameter 0 .* is not complete: .* load_state_dict"):
            train(other, 1)


def test_read_state_is_a_window(tmp_path):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path), 2)
    p = optimizer.param_groups[0]["params"][0]
    state = optimizer._store.read(p)
    assert mapped(tmp_path) == 1
    assert list(state)[:2] == ["exp_avg", "absmax"]
    del state
    assert mapped(tmp_path) == 0


def test_a_window_that_is_held_outlives_the_optimizer(tmp_path):
    optimizer = train(make(PagedCAME8bit, page_dir=tmp_path), 2)
    p = optimizer.param_groups[0]["params"][0]
    codes = optimizer._store.read(p)["exp_avg"]
    copied = codes.clone()
    del optimizer
    assert torch.equal(codes, copied)


# --- what users do to an optimizer ----------------------------------------------------------------


def test_state_that_was_thrown_away_begins_at_zero():
    optimizer = train(make(PagedCAME8bit), 2)
    expected = train(make(CAME8bit), 2)
    for o in (optimizer, expected):
        o.state.pop(o.param_groups[0]["params"][0])
        train(o, 1, first=2)
    assert_same(complete(expected), complete(optimizer))
    for o in (optimizer, expected):
        o.state.clear()
        train(o, 1, first=3)
    assert_same(complete(expected), complete(optimizer))


def test_pages_of_a_group_that_has_gone_are_given_back(tmp_path):
    """With the next step, once the state is gone, too; until then the group may come back."""
    shapes = [(256, 300), (128, 64, 3, 3), (7,)]
    optimizer, expected = make(PagedCAME8bit, page_dir=tmp_path), make(CAME8bit)
    extra = [[start(shape, seed=50 + i) for i, shape in enumerate(shapes)] for _ in range(2)]
    pages_of = optimizer._store.pager._pages
    for o, params in ((optimizer, extra[0]), (expected, extra[1])):
        o.add_param_group({"params": params})
        train(o, 1)
        group = o.param_groups.pop()
        train(o, 1, first=1)
        o.add_param_group({"params": group["params"]})
        train(o, 1, first=2)
    assert_same(complete(expected), complete(optimizer))
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    assert len(pages_of) == len(PAGED) + 2
    for o, params in ((optimizer, extra[0]), (expected, extra[1])):
        o.param_groups.pop()
        for p in params:
            del o.state[p]
        train(o, 2, first=3)
    assert len(pages_of) == len(PAGED)
    # Their places are used again, and begin at zero.
    for o in (optimizer, expected):
        o.add_param_group({"params": [start(shape, seed=60) for shape in shapes[:2]]})
        train(o, 2, first=5)
    assert file.stat().st_size == size
    assert_same(complete(expected), complete(optimizer))


def test_options_that_decide_the_layout_change_nothing_that_is_there():
    optimizer, expected = make(PagedCAME8bit), make(CAME8bit)
    for o in (optimizer, expected):
        train(o, 2, left_out={(0, 6), (1, 6)})
        o.param_groups[0].update(min_8bit_size=10**9, factored_view="last_two")
        train(o, 2, first=2)
    assert_same(complete(expected), complete(optimizer))


def test_frozen_parameters_take_no_room_until_they_train(tmp_path):
    optimizer = make(PagedCAME8bit, page_dir=tmp_path)
    expected = make(CAME8bit)
    for o in (optimizer, expected):
        first = o.param_groups[0]["params"][0]
        first.requires_grad_(False)
        train(o, 1, left_out={(0, 0)})
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    for o in (optimizer, expected):
        o.param_groups[0]["params"][0].requires_grad_()
        train(o, 2, first=1)
    assert file.stat().st_size > size
    assert_same(complete(expected), complete(optimizer))


def test_a_parameter_that_changed_shape_is_refused():
    optimizer = train(make(PagedCAME8bit, shapes=[(256, 300)]), 1)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = None
    param.data = torch.ones(300, 256)
    param.grad = torch.ones(300, 256)
    with pytest.raises(ValueError, match=r"shape \(300, 256\), its state was made for sh"):
        optimizer.step()


# --- options --------------------------------------------------------------------------------------

BAD = [
    ({"is_paged": 1}, "got is_paged 1, expected True or False"),
    ({"page_budget": 5}, "got page_dir None and page_budget 5 without is_paged=True"),
    ({"page_dir": "."}, "without is_paged=True"),
    ({"is_paged": True, "page_budget": 0}, "got page_budget 0, expected a number of bytes > 0"),
    ({"is_paged": True, "page_budget": 1.5}, "got page_budget 1.5, expected a number of bytes"),
    ({"is_paged": True, "page_budget": True}, "got page_budget True, expected a number"),
    ({"is_paged": True, "page_dir": 3}, "got page_dir 3, expected the path of a directory"),
    ({"is_paged": True, "page_dir": "no/such"}, "'no/such', which is not an existing directory"),
    ({"is_paged": True, "page_dir": ""}, "'', which is not an existing directory"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("cls", [CAME, CAME8bit])
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([start((3, 3))], **options)


def test_homes_and_budgets_by_device(tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    unnamed, named = (Pager(Placement(directory)) for directory in (None, tmp_path))
    assert isinstance(unnamed._backing(gpu), PinnedMemory)
    assert isinstance(unnamed._backing(cpu), PageFile)
    assert named._backing(gpu) is named._backing(cpu)
    with pytest.raises(NotImplementedError, match="CPU and on CUDA devices, got xpu"):
        named._backing(torch.device("xpu"))
    mib = 1 << 20
    assert default_budget("cuda", [mib] * 1000) == 256 * mib
    assert default_budget("cuda", [100 * mib] * 10) == 300 * mib
    assert default_budget("cuda", [mib] * 7) == 7 * mib  # all there is
    assert default_budget("cpu", [mib] * 320) == 20 * mib
    assert default_budget("cpu", [mib] * 5000) == 64 * mib
    assert default_budget("cpu", [mib] * 7) == mib


def test_reserving_is_all_or_nothing():
    class Elsewhere(torch.nn.Parameter):
        device = property(lambda self: torch.device("xpu"))

    pager, layout = Pager(Placement()), plan((256, 300))
    here, there = (kind(torch.zeros(256, 300)) for kind in (torch.nn.Parameter, Elsewhere))
    with pytest.raises(NotImplementedError, match="got xpu"):
        pager.reserve([(here, layout), (there, layout)])
    assert here not in pager
    assert there not in pager
    pager.reserve([(here, layout)])
    assert pager._pages[here].address == pagefile.GRANULE  # the place that was given back


def test_a_budget_below_a_page_says_what_is_needed():
    layout = pages.page_layout(plan((256, 300)))
    optimizer = make(PagedCAME8bit, shapes=[(9,), (256, 300)], page_budget=layout.nbytes - 1)
    before = complete(optimizer)
    with pytest.raises(ValueError, match=rf"of shape \(256, 300\) needs a page of {layout.nbytes}"):
        train(optimizer, 1)
    assert_same(before, complete(optimizer))
    assert not optimizer.state
    train(make(PagedCAME8bit, shapes=[(256, 300)], page_budget=layout.nbytes), 1)


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    optimizer = make(PagedCAME8bit, page_dir=Path("pages"))
    monkeypatch.chdir("/")
    train(optimizer, 1)
    assert os.listdir(tmp_path / "pages") == ["came8bit-0.pages"]
