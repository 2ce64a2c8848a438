"""Pages of a device: copies on queues of their own, ordered by events and by nothing else."""

import copy
from itertools import permutations

import pytest
import torch
from fake_queues import QUEUES, FakeQueues, operators_on
from paged_training import complete, make, train
from training import assert_same, gradients, start

from came8bit import CAME8bit, CAME32bit, PagedCAME8bit, PagedCAME32bit
from came8bit.paging import pager as pagers
from came8bit.paging import pages
from came8bit.paging.page_file import PageFile
from came8bit.paging.pages import PinnedMemory
from came8bit.paging.transfer import StreamTransfer
from came8bit.state.store import missing_layouts

SHAPES = [(64, 64)] * 5  # pages of one size: a ring of three holds exactly three
MIXED = [(64, 64), (96, 130), (7,), (40, 300), (), (64, 64), (5000,), (2, 64, 96), (30, 30)]
POLICIES = [*permutations(QUEUES), 1, 2]


def host_memory(nbytes):
    return torch.zeros(nbytes, dtype=torch.uint8)


@pytest.fixture
def device(monkeypatch):
    """``device(policy, ...)``: from now on CPU parameters have their pages behind fake queues."""

    def set_up(policy=0, ignore=None, backing="pinned", slab=1 << 20):
        queues = FakeQueues(policy, ignore)
        monkeypatch.setattr(pages, "MIN_PAGE_BYTES", 1 << 12)
        backings = {
            "pinned": lambda: PinnedMemory(host_memory, slab),
            "file": lambda: PageFile(None),
        }
        staging = host_memory if backing == "file" else None
        monkeypatch.setattr(pagers.Pager, "_backing", lambda self, device: backings[backing]())
        monkeypatch.setattr(
            pagers, "transfer_for", lambda _, backing: StreamTransfer(queues, backing, staging)
        )
        return queues

    return set_up


def largest_page(optimizer):
    layouts = [
        pages.page_layout(layout)
        for _, layout in missing_layouts(optimizer.param_groups, optimizer.state)
    ]
    return max(layout.nbytes for layout in layouts if layout)


def budget_for(cls, shapes, rings):
    return int(rings * largest_page(make(cls, shapes=shapes)))


def run_on(queues, cls, shapes, steps=3, left_out=(), **options):
    optimizer = make(cls, shapes=shapes, **options)
    with operators_on(queues):
        train(optimizer, steps, left_out=left_out)
    queues.drain()
    return optimizer


@pytest.mark.parametrize("backing", ["pinned", "file"])
@pytest.mark.parametrize("pages_in_budget", [1, 2, 3, 4.5, 100])
@pytest.mark.parametrize(("dense", "cls"), [(CAME8bit, PagedCAME8bit), (CAME32bit, PagedCAME32bit)])
def test_same_bits_whatever_is_late(device, dense, cls, pages_in_budget, backing):
    left_out = {(1, 3), (2, 0), (2, 1), (2, 2)}
    for dtype in (torch.float32, torch.bfloat16):
        expected = train(make(dense, dtype, MIXED), 4, left_out=left_out)
        for policy in POLICIES[::3]:
            queues = device(policy, backing=backing, slab=1 << 13)
            budget = budget_for(cls, MIXED, pages_in_budget)
            got = run_on(
                queues, cls, MIXED, 4, left_out, dtype=dtype, page_budget=budget, cautious=False
            )
            assert 0 < queues.allocated <= budget
            assert_same(complete(expected), complete(got))


def test_the_host_never_waits_for_pinned_pages(device):
    queues = device(("compute", "h2d", "d2h"))
    optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=budget_for(PagedCAME8bit, SHAPES, 3))
    with operators_on(queues):
        train(optimizer, 3)
    assert queues.host_waits == 0
    assert queues.trace.count("compute") == 3 * len(SHAPES)
    params = optimizer.param_groups[0]["params"]
    before = [start(p.shape, seed=i) for i, p in enumerate(params)]
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))  # all yet to come
    queues.drain()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_device_without_room_says_so(device, monkeypatch):
    queues = device()

    def full(nbytes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore text")

    optimizer = make(PagedCAME8bit, shapes=SHAPES)
    with monkeypatch.context() as patch:
        patch.setattr(queues, "allocate", full)
        with pytest.raises(MemoryError, match=r"wanted .* \(CUDA out of memory\. Tried to\)"):
            train(optimizer, 1)
    assert not optimizer.state
    with operators_on(queues):
        train(optimizer, 1)
    queues.drain()


def test_copies_in_are_asked_for_ahead_of_use(device):
    queues = device()
    optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=budget_for(PagedCAME8bit, SHAPES, 3))
    with operators_on(queues):
        train(optimizer, 2)
    queues.drain()
    copied, used = 0, 0
    for what in queues.trace:
        copied += what == "copy h2d"
        used += what == "compute"
        if used:
            assert copied >= used + 1  # the next one has been asked for, before this one computes


def test_what_fits_is_copied_once(device):
    queues = device()
    optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=1 << 30)
    with operators_on(queues):
        train(optimizer, 5)
    queues.drain()
    assert queues.trace.count("copy h2d") == len(SHAPES)
    assert queues.trace.count("copy d2h") == 0
    assert queues.trace.count("compute") == 5  # all of a step in one call
    expected = train(make(CAME8bit, shapes=SHAPES), 5)
    assert_same(complete(expected), complete(optimizer))
    assert queues.trace.count("copy d2h") == len(SHAPES)  # to be read


def test_every_wait_is_needed(device):
    """Leave out any one of them, and with some timing the bits are wrong."""
    expected = train(make(CAME8bit, shapes=SHAPES), 2)
    expected = complete(expected)
    queues = device()
    budget = budget_for(PagedCAME8bit, SHAPES, 3)
    run_on(queues, PagedCAME8bit, SHAPES, 2, page_budget=budget)
    assert all(queues.waits.values())
    for queue, count in queues.waits.items():
        for number in range(count):
            assert any(
                differs(device, policy, (queue, number), budget, expected) for policy in POLICIES
            ), (queue, number)


def differs(device, policy, ignore, budget, expected):
    queues = device(policy, ignore)
    got = complete(run_on(queues, PagedCAME8bit, SHAPES, 2, page_budget=budget))
    try:
        assert_same(expected, got)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("backing", ["pinned", "file"])
def test_state_is_replaced_while_copies_are_under_way(device, backing):
    """Loading, reading and copying wait for what touches the same bytes."""
    other = make(CAME8bit, shapes=SHAPES, lr=3e-3)
    train(other, 2)
    for policy in POLICIES:
        queues = device(policy, backing=backing)
        budget = budget_for(PagedCAME8bit, SHAPES, 3)
        optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=budget)
        expected = make(CAME8bit, shapes=SHAPES)
        with operators_on(queues):
            train(optimizer, 2)
            train(expected, 2)
            saved = optimizer.state_dict()
            queues.drain()
            assert_same(complete(expected), complete(optimizer))
            train(optimizer, 1, first=2)
            optimizer.load_state_dict(other.state_dict())
            train(optimizer, 1, first=3)
            train(expected, 1, first=2)
            queues.drain()
            expected.load_state_dict(other.state_dict())
            train(expected, 1, first=3)
            twin = copy.deepcopy(optimizer)
            train(optimizer, 1, first=4)
            train(twin, 2, first=4)
            train(expected, 1, first=4)
            queues.drain()
            assert_same(complete(expected), complete(optimizer))
            train(expected, 1, first=5)
            queues.drain()
            assert_same(complete(expected), complete(twin))
        fresh = make(CAME8bit, shapes=SHAPES)
        fresh.load_state_dict(saved)


def test_the_end_of_a_step_writes_to_the_file_what_has_arrived(device):
    queues = device(backing="file")
    optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=budget_for(PagedCAME8bit, SHAPES, 3))
    with operators_on(queues):
        train(optimizer, 2)
        (lane,) = optimizer._store.pager._by_device.values()
        behind = dict(lane.transfer._behind)
        assert behind
        optimizer._store.flush()
        assert lane.transfer._behind.keys() == behind.keys()  # nothing has arrived, nobody waits
        queues.drain()
        optimizer._store.flush()
        assert not lane.transfer._behind
        train(optimizer, 1, first=2)
    queues.drain()
    expected = train(make(CAME8bit, shapes=SHAPES), 3)
    assert_same(complete(expected), complete(optimizer))


def test_a_parameter_at_a_time_in_a_known_order(device):
    """As backward does: the next page comes while this one is used."""
    queues = device(("compute", "h2d", "d2h"))
    optimizer = make(PagedCAME8bit, shapes=SHAPES, page_budget=budget_for(PagedCAME8bit, SHAPES, 3))
    expected = train(make(CAME8bit, shapes=SHAPES), 3)

    def one_at_a_time(t):
        group = optimizer.param_groups[0]
        backwards = list(enumerate(group["params"]))[::-1]
        for index, p in backwards:
            p.grad = next(gradients(p.shape, steps=1, seed=100 * t + index))
            optimizer._update_one(group, p, index)
        optimizer._store.flush()
        return [p for _, p in backwards]

    with operators_on(queues), torch.no_grad():
        order = one_at_a_time(0)
        optimizer._store.set_prefetch_order(order)
        for t in (1, 2):
            del queues.trace[:]
            one_at_a_time(t)
            copied, used = 3 if t == 2 else 0, 0
            for what in queues.trace:
                copied += what == "copy h2d"
                used += what == "compute"
                assert copied > used or t == 1
            assert used == len(SHAPES)
    queues.drain()
    assert queues.host_waits == 0
    assert_same(complete(expected), complete(optimizer))


class Away(torch.Tensor):
    """Says that it is on another device, until it is asked to come."""

    device = property(lambda self: torch.device("meta"))

    def to(self, *_):
        return self.as_subclass(torch.Tensor)


def test_pages_follow_a_parameter_to_another_device(device, monkeypatch):
    """First in a window of a file, then behind queues, then back."""
    expected, optimizer = make(CAME8bit, shapes=MIXED), None
    real = pagers.transfer_for
    queues = device()
    fake = pagers.transfer_for
    behind_queues = False
    monkeypatch.setattr(
        pagers, "transfer_for", lambda d, h: (fake if behind_queues else real)(d, h)
    )
    monkeypatch.setattr(
        pagers.Pager,
        "_backing",
        lambda self, d: PinnedMemory(host_memory) if behind_queues else PageFile(None),
    )
    optimizer = make(PagedCAME8bit, shapes=MIXED, page_budget=budget_for(PagedCAME8bit, MIXED, 3))
    train(expected, 6)
    with operators_on(queues):
        train(optimizer, 2)
        for step, elsewhere in ((2, True), (4, False)):
            queues.drain()
            behind_queues = elsewhere
            pager = optimizer._store.pager
            # There is one real device here: the pages believe that they have been on another.
            away = torch.device("meta", step)
            lane = pager._by_device.pop(torch.device("cpu"))
            pager._by_device[away] = lane
            for page in pager._pages.values():
                page.device = away
            for state in optimizer.state.values():
                for name, tensor in state.items():
                    state[name] = tensor.as_subclass(Away)
            train(optimizer, 2, first=step)
            assert not lane.pages
            for state in optimizer.state.values():
                assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    queues.drain()
    assert_same(complete(expected), complete(optimizer))
