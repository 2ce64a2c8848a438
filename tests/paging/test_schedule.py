"""The planner of paged state: laws that hold for every trace of events it gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from came8bit.paging.schedule import (
    FREE,
    GROUPS_IN_RING,
    STAGE,
    USE,
    WAIT,
    WRITE_BACK,
    Event,
    Schedule,
    trace,
)


class Device:
    """Carries out events one after the other and objects to what must not be.

    ``backing`` and ``here`` count how often a page has been changed, as known in each place.
    """

    def __init__(self, sizes: dict[int, int], budget: int) -> None:
        self.sizes, self.budget = sizes, budget
        self.backing = dict.fromkeys(sizes, 0)
        self.here: dict[int, int] = {}
        self.offsets: dict[int, int] = {}
        self.waited: set[int] = set()

    def do(self, events: list[Event]) -> None:
        for event in events:
            page, offset = event.page, event.offset
            if event.kind == STAGE:
                assert page not in self.here, "staged twice"
                end = offset + self.sizes[page]
                assert offset >= 0
                assert end <= self.budget
                for other, start in self.offsets.items():
                    assert end <= start or start + self.sizes[other] <= offset, "still in use"
                self.here[page], self.offsets[page] = self.backing[page], offset
                continue
            assert self.offsets[page] == offset
            if event.kind == WAIT:
                self.waited.add(page)
            elif event.kind == USE:
                assert page in self.waited
                self.here[page] += 1
            elif event.kind == WRITE_BACK:
                self.backing[page] = self.here[page]
            elif event.kind == FREE:
                assert self.backing[page] == self.here[page], "freed before it was written back"
                self.waited.discard(page)
                del self.here[page], self.offsets[page]
            else:
                raise AssertionError(event)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[int, int], int]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    budget = draw(st.integers(max(sizes), max(max(sizes), sum(sizes) + 5)))
    return dict(enumerate(sizes)), budget


@given(problems(), st.randoms(use_true_random=False), st.integers(1, 4), st.booleans())
def test_every_use_sees_the_last_change_and_the_budget_holds(
    problem, random, steps, reuse_blocks_host
):
    sizes, budget = problem
    order = list(sizes)
    random.shuffle(order)
    events = trace(sizes, order, budget, steps, reuse_blocks_host)
    device = Device(sizes, budget)
    device.do(events)
    assert device.backing == dict.fromkeys(sizes, steps)
    uses = [event.page for event in events if event.kind == USE]
    assert uses == order * steps


@settings(max_examples=300)
@given(problems(), st.data())
def test_any_order_of_use_is_right(problem, data):
    """Pages left out, used twice, in other orders; backings read and replaced in between."""
    sizes, budget = problem
    schedule = Schedule(sizes, budget, data.draw(st.booleans()))
    device = Device(sizes, budget)
    pages = st.sampled_from(list(sizes))
    changes = dict.fromkeys(sizes, 0)
    for _ in range(data.draw(st.integers(1, 15))):
        kind = data.draw(st.sampled_from(["expect", "use", "use", "use", "backing", "forget"]))
        if kind == "expect":
            device.do(schedule.expect(data.draw(st.lists(pages, unique=True))))
        elif kind == "backing":
            page = data.draw(pages)
            device.do(schedule.evict([page]))
            assert device.backing[page] == changes[page]
        elif kind == "forget":
            page = data.draw(pages)
            device.do(schedule.evict([page]))
            device.do(schedule.forget(page))
            assert page not in device.here
        else:
            members = data.draw(st.lists(pages, unique=True))
            while members:
                count = schedule.group_size(members)
                assert count >= 1
                group, members = members[:count], members[count:]
                device.do(schedule.begin(group))
                device.do(schedule.end(group))
                for page in group:
                    changes[page] += 1
    device.do(schedule.evict(sizes))
    assert device.backing == changes


@given(problems(), st.integers(2, 4))
def test_what_fits_stays(problem, steps):
    sizes, _ = problem
    events = trace(sizes, list(sizes), sum(sizes.values()), steps)
    kinds = [event.kind for event in events]
    assert kinds.count(STAGE) == len(sizes)
    assert kinds.count(WRITE_BACK) == len(sizes)  # at the very end
    assert kinds.count(FREE) == 0


@given(problems(), st.integers(3, 5))
def test_every_other_page_moves_once_a_step_and_kept_ones_do_not(problem, steps):
    sizes, budget = problem
    schedule = Schedule(sizes, budget)
    events = trace(sizes, list(sizes), budget, steps)
    for page in sizes:
        backs = [event for event in events if event == Event(WRITE_BACK, page, event.offset)]
        stages = [event for event in events if event.kind == STAGE and event.page == page]
        if page in schedule.kept:
            assert len(backs) == len(stages) == 1
        else:
            assert len(backs) == steps
            assert len(stages) <= steps + 1


@given(problems(), st.integers(1, 3))
def test_the_next_group_is_on_its_way_before_this_one_computes(problem, steps):
    """With room for three of the largest, a copy in never waits for the computation before it."""
    sizes, _ = problem
    largest, total = max(sizes.values()), sum(sizes.values())
    budget = max(GROUPS_IN_RING * largest, total // 2)
    schedule, device = Schedule(sizes, budget), Device(sizes, budget)
    order = list(sizes)
    staged: set[int] = set()

    def do(events):
        device.do(events)
        for event in events:
            if event.kind == STAGE:
                staged.add(event.page)
            elif event.kind == FREE:
                staged.discard(event.page)
        return events

    for _ in range(steps):
        do(schedule.expect(order))
        done = 0
        while done < len(order):
            count = schedule.group_size(order[done:])
            group = order[done : done + count]
            done += count
            following = order[done:] or order
            following = following[: schedule.group_size(following)]
            assert staged >= set(group), "would have to wait for a copy that has just begun"
            assert not [event for event in do(schedule.begin(group)) if event.kind == STAGE]
            # Its room never was in the way: the next group is there, or this one is all there is.
            assert staged >= set(following)
            do(schedule.end(group))


@given(problems())
def test_groups_are_a_third_of_the_ring_or_a_single_page(problem):
    sizes, budget = problem
    schedule = Schedule(sizes, budget)
    order = list(sizes)
    while order:
        count = schedule.group_size(order)
        passing = [sizes[page] for page in order[:count] if page not in schedule.kept]
        ring = budget - sum(sizes[page] for page in schedule.kept)
        assert sum(passing) <= ring // GROUPS_IN_RING or len(passing) == 1
        assert sum(sizes[page] for page in order[:count]) <= schedule.at_once
        order = order[count:]
    assert schedule.capacity <= budget


@given(problems(), st.integers(2, 4))
def test_patience_leaves_what_was_just_used_alone(problem, steps):
    """Unless there is no other place for what has to come, and then it is not prefetched."""
    sizes, budget = problem
    schedule, order = Schedule(sizes, budget, reuse_blocks_host=True), list(sizes)
    for _ in range(steps):
        schedule.expect(order)
        done = 0
        while done < len(order):
            group = order[done : done + schedule.group_size(order[done:])]
            schedule.begin(group)
            freed = {event.page for event in schedule.end(group) if event.kind == FREE}
            assert not freed & set(group)
            done += len(group)


def test_a_page_larger_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="a page has 11 bytes, the budget is 10"):
        Schedule({0: 3, 1: 11}, 10)


def test_nothing_to_do():
    schedule = Schedule({}, 1)
    assert schedule.expect([]) == schedule.begin([]) == schedule.end([]) == []
    assert schedule.group_size([]) == 0
    assert trace({}, [], 0) == []


def test_the_order_of_a_small_ring_written_out():
    """Four pages of 2 in a ring of 6: what arrives takes the place of what has left."""
    names = dict(enumerate("abcd"))
    letters = {STAGE: "s", WAIT: "w", USE: "u", WRITE_BACK: "b", FREE: "f"}
    events = trace(dict.fromkeys(names, 2), list(names), 6)
    text = " ".join(f"{letters[event.kind]}{names[event.page]}{event.offset}" for event in events)
    assert text == (
        "sa0 sb2 sc4 "  # prefetched at the beginning
        "wa0 ua0 ba0 fa0 sd0 "  # a computes and is written back; d takes its bytes
        "wb2 ub2 bb2 fb2 sa2 "  # round and round: a comes back for the next step
        "wc4 uc4 bc4 fc4 sb4 wd0 ud0 bd0 fd0 sc0"
    )
